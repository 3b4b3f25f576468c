"""Journals: what a kill leaves is found again, whatever was torn."""

from pathlib import Path

import pytest

from archscale_megatron.evaluation.journal import Journal

HEADER = {"options": {"limit": 3, "data": ("a", "b")}, "fingerprint": "12"}
RECORDS = {"one": [1.5, None], "two": {"text": 'ö\u2028"\n'}, "three": float("nan")}


def begin(path: Path, **options: bool) -> Journal:
    return Journal(path, HEADER, **options)


def killed(path: Path) -> bytes:
    """What a journal of all records holds when its process is killed."""
    journal = begin(path)
    for key, record in RECORDS.items():
        journal.append(key, record)
        assert journal.path.read_bytes().endswith(b"\n")
    content = journal.path.read_bytes()
    journal._file.close()  # as a kill does
    return content


def test_what_was_finished_is_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    assert begin(path).done == {}
    killed(path)
    journal = begin(path)
    assert repr(journal.done) == repr(RECORDS)
    assert journal.path == tmp_path / "new" / "a.jsonl"
    journal.append("four", 4)
    journal.finish()
    assert not journal.path.exists()
    assert begin(path).done == {}


def test_torn_anywhere(tmp_path: Path) -> None:
    """After a cut at any byte the whole lines are there, and one more can be appended and read."""
    path = tmp_path / "a.json"
    content = killed(path)
    for cut in range(len(content)):
        path.with_suffix(".jsonl").write_bytes(content[:cut])
        journal = begin(path)
        whole = max(content[:cut].count(b"\n") - 1, 0)
        assert list(journal.done) == list(RECORDS)[:whole]
        journal.append("more", cut)
        journal._file.close()
        again = begin(path)
        assert list(again.done) == [*list(RECORDS)[:whole], "more"] and again.done["more"] == cut
        again._file.close()


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '["a"]', "null"])
def test_damage_before_the_last_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.json"
    lines = killed(path).decode().split("\n")
    path.with_suffix(".jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(ValueError, match="a.jsonl: line 3 is damaged .*--again") as raised:
        begin(path)
    assert "\n" not in str(raised.value)
    assert begin(path, again=True).done == {}


def test_another_header(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = killed(path)
    other = HEADER | {"options": HEADER["options"] | {"limit": 4}}
    with pytest.raises(ValueError, match=r"other options \(options: limit is 3 there and 4 here\); .* --again"):
        Journal(path, other)
    assert path.with_suffix(".jsonl").read_bytes() == content
    assert Journal(path, other, again=True).done == {}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    journal = begin(path)
    journal.append("one", 1)
    for again in (False, True):
        with pytest.raises(ValueError, match="another process is at this evaluation"):
            begin(path, again=again)
    journal._file.close()
    assert begin(path).done == {"one": 1}
