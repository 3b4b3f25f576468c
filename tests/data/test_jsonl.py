"""Reading JSONL: lines, numbers and batches from every kind of file, damaged files, fields."""

import gzip
import random

import pytest
import zstandard

from archscale_megatron.data import jsonl


def numbered_lines(paths):
    return [
        (batch.path, number, line)
        for batch in jsonl.read_batches(paths)
        for number, line in enumerate(batch.lines, batch.first_line)
    ]


def compress(data: bytes, kind: str) -> bytes:
    if kind == "gz":  # two members, as `cat a.gz b.gz` makes them
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    if kind == "zst":
        return zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    return data


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst"])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_across_blocks(tmp_path, monkeypatch, kind, end):
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 7)
    monkeypatch.setattr(jsonl, "BATCH_BYTES", 50)
    rng = random.Random(0)
    lines = [bytes(rng.choices(b"abc\r", k=rng.randrange(40))) for _ in range(200)] + [b"end"]
    path = tmp_path / f"x.{kind}"
    path.write_bytes(compress(b"\n".join(lines) + end, kind))
    assert numbered_lines([str(path)]) == [(str(path), i, line) for i, line in enumerate(lines, 1)]
    batches = list(jsonl.read_batches([str(path)]))
    assert len(batches) > 50 and sum(batch.stored_bytes for batch in batches) == path.stat().st_size


@pytest.mark.parametrize("length, kept", [(100, True), (101, False), (1000, False)])
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_too_long_line(tmp_path, monkeypatch, length, kept, block):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", block)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"one\n" + b"x" * length + b"\nthree\n" + b"y" * length)
    x, y = (letter * length if kept else None for letter in (b"x", b"y"))
    assert [line for _, _, line in numbered_lines([str(path)])] == [b"one", x, b"three", y]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_file(tmp_path, kind, damage):
    data = (gzip if kind == "gz" else zstandard).compress(random.Random(0).randbytes(300_000))
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(data[:-9] if damage == "cut" else b"not compressed")
    with pytest.raises(jsonl.DataError, match=str(path)):
        list(jsonl.read_batches([str(path)]))


def test_expand_keeps_the_order(tmp_path):
    for name in ("b1", "b0", "a"):
        (tmp_path / name).touch()
    found = jsonl.expand([str(tmp_path / "b*"), str(tmp_path / "a")])
    assert [path[-2:] for path in found] == ["b0", "b1", "/a"]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} {}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object but a list"),
        (b'{"other": 1}', "no key \"text\"; the line has 'other'"),
        (b"{}", "the line has none"),
        (b'{"text": null}', '"text" is not text but NoneType'),
        (b'{"text": ["a"]}', '"text" is not text but list'),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
        (b'{"text": "ab\\ud800c"}', '"text" has half of a surrogate pair (character 2)'),
        (None, "longer than 64 MiB"),
    ],
)
def test_bad_line_says_why(line, reason):
    with pytest.raises(ValueError) as error:
        jsonl.text_fields(line, ["text"])
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_good_lines():
    assert jsonl.text_fields(b'{"b": "\\ud83d\\ude00", "n": NaN, "a": ""}\r', ["a", "b"]) == ["", "\U0001f600"]
