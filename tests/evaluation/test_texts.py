"""Tokens and bytes of local files of every kind."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from archscale_megatron.data.indexed import IndexedDatasetWriter, publish
from archscale_megatron.evaluation.texts import Document, encoded, files_of, joined, read_documents

TEXTS = ["the cat", "", "öé", "a\r\nb c\n"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, of which "th" and "the" are tokens too, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<end>", *alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_bytes_behind_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encoded("the cat", tokenizer)
    assert (len(whole.ids), whole.bytes, whole.head) == (5, 7, 3)
    cut = encoded("the cat", tokenizer, 3)
    assert cut.ids.tolist() == whole.ids[:3].tolist() and (cut.bytes, cut.head) == (5, 3)
    accents = encoded("öab", tokenizer)
    assert (len(accents.ids), accents.bytes, accents.head) == (4, 4, 2)  # the first token is half of a letter
    assert (encoded("", tokenizer).bytes, encoded("t", tokenizer).bytes) == (0, 1)


def test_all_kinds_of_files_hold_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer(text).input_ids for text in TEXTS]
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    texts = [tmp_path / f"{i}.txt" for i in range(len(TEXTS))]
    for paths in ([tmp_path / "a.jsonl"], [tmp_path / "b.jsonl.gz"], texts):
        found = list(read_documents(paths, tokenizer))
        assert [d.ids.tolist() for d in found] == ids
        assert [d.bytes for d in found] == [len(text.encode()) for text in TEXTS]

    writer = IndexedDatasetWriter(str(tmp_path / "c_text"), 300)
    writer.write(np.concatenate([np.array(one, int) for one in ids]), np.array([len(one) for one in ids]))
    writer.finish()
    publish([writer])
    for name in ("c_text", "c_text.bin", "c_text.idx"):
        assert files_of(tmp_path / name, False) == [tmp_path / "c_text.bin", tmp_path / "c_text.idx"]
        found = list(read_documents([tmp_path / name], tokenizer))
        assert [d.ids.tolist() for d in found] == [one for one in ids if one]
        assert {d.bytes for d in found} == {None}

    for one in (i for i in ids if i):
        np.array(one, "<u2").tofile(tmp_path / "raw.bin")
        (raw,) = read_documents([tmp_path / "raw.bin"], tokenizer, raw_tokens=True)
        assert raw.ids.tolist() == one and raw.bytes is None


def test_limits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["the cat", "tt", "abc"]))
    ids = [d.ids.tolist() for d in read_documents([tmp_path / "a.jsonl"], tokenizer)]
    assert [len(one) for one in ids] == [5, 2, 3]
    for tokens in range(1, 12):
        found = list(read_documents([tmp_path / "a.jsonl"], tokenizer, tokens=tokens))
        assert sum([d.ids.tolist() for d in found], []) == sum(ids, [])[:tokens]
        assert all(len(d.ids) for d in found)
        assert [d.ids.tolist() for d in found][:-1] == ids[: len(found) - 1]
    for count in (1, 2, 5):
        assert [d.ids.tolist() for d in read_documents([tmp_path / "a.jsonl"], tokenizer, documents=count)] == ids[
            :count
        ]


def test_joined() -> None:
    texts = [Document(np.array([4, 5]), 7, 3), Document(np.array([], int), 0), Document(np.array([6]), 2, 2)]
    whole = joined(texts, [1])
    assert whole.ids.tolist() == [4, 5, 1, 1, 6] and (whole.bytes, whole.head) == (9, 3)
    tokens = joined([*texts[:1], Document(np.array([8, 1]), None), Document(np.array([9]), None)], [1])
    assert tokens.ids.tolist() == [4, 5, 1, 8, 1, 9] and tokens.bytes is None
    assert joined([], [1]).ids.tolist() == []


def test_bad_files_are_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "latin.txt").write_bytes(b"ab\xff")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "raw.bin").write_bytes(b"123")
    np.array([5, 400], "<u2").tofile(tmp_path / "other.bin")
    for name in ("bad.bin", "bad.idx"):
        (tmp_path / name).write_bytes(b"nothing")
    for name, raw, problem in (
        ("nothing", False, "no such file, nor .*nothing.bin with"),
        ("latin.txt", False, r"latin.txt: not UTF-8 text \(byte 2\)"),
        ("a.jsonl", False, "a.jsonl:2: no key \"text\"; the line has 'body'"),
        ("b.jsonl.gz", False, "b.jsonl.gz: "),
        ("raw.bin", False, "raw.bin: has no .idx beside it; --raw-tokens reads it"),
        ("raw.bin", True, "raw.bin: 3 bytes, which are no uint16 tokens"),
        ("other.bin", True, "other.bin: holds the token 400, and the model's tokenizer has 259"),
        ("bad", False, "bad: not an indexed dataset"),
    ):
        with pytest.raises(ValueError, match=problem) as raised:
            list(read_documents([tmp_path / name], tokenizer, raw_tokens=raw))
        assert "\n" not in str(raised.value)
