"""The indexed dataset writer against megatron-core's IndexedDatasetBuilder, byte for byte."""

import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from archscale_megatron.data import indexed


def megatron_bytes(prefix, documents, vocab_size):
    """(bin, idx) as Megatron's tools/preprocess_data.py has IndexedDatasetBuilder write them."""
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(prefix + ".idx")
    return tuple(open(prefix + suffix, "rb").read() for suffix in (".bin", ".idx"))


@pytest.mark.parametrize("vocab_size", [512, 65499, 65500, 200_000])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_bytes_equal_megatron(tmp_path, monkeypatch, vocab_size, chunk):
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    lengths = [0, 5, 0, 0, 1, 300, 7, 0]
    documents = [rng.integers(0, min(vocab_size, 65499), size=n).tolist() for n in lengths]
    documents[1][0] = vocab_size - 1
    writer = indexed.IndexedDatasetWriter(str(tmp_path / "ours"), vocab_size)
    for batch in (documents[:3], documents[3:3], documents[3:]):
        ids = np.array([i for ids in batch for i in ids], np.uint32)
        writer.write(ids, np.array([len(ids) for ids in batch], np.int64))
    writer.finish()
    assert not (tmp_path / "ours.bin").exists() and not (tmp_path / "ours.idx").exists()
    indexed.publish([writer])
    expected = megatron_bytes(str(tmp_path / "theirs"), documents, vocab_size)
    assert ((tmp_path / "ours.bin").read_bytes(), (tmp_path / "ours.idx").read_bytes()) == expected
    assert (writer.documents, writer.sequences, writer.tokens) == (8, 4, 313)
    assert sorted(os.listdir(tmp_path)) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_id_outside_dtype_is_refused(tmp_path):
    writer = indexed.IndexedDatasetWriter(str(tmp_path / "x"), 1000)
    with pytest.raises(ValueError, match="token id 70000 does not fit uint16"):
        writer.write(np.array([70000]), np.array([1]))


@pytest.mark.parametrize("survives", range(4))
def test_kill_during_publish_leaves_no_false_pair(tmp_path, monkeypatch, survives):
    """Old and new differ in every file; after any number of renames no .idx stands beside another run's .bin."""

    def write(value):
        writers = []
        for name in "ab":
            writers.append(indexed.IndexedDatasetWriter(str(tmp_path / name), 1000))
            writers[-1].write(np.full(value, value), np.array([value]))
            writers[-1].finish()
        return writers

    indexed.publish(write(1))
    writers = write(2)
    replace, calls = os.replace, []

    def dying_replace(*paths):
        if len(calls) == survives:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        indexed.publish(writers)
    for name in "ab":
        if (tmp_path / f"{name}.idx").exists():
            tokens = int.from_bytes((tmp_path / f"{name}.idx").read_bytes()[34:38], "little")
            assert (tmp_path / f"{name}.bin").stat().st_size == 2 * tokens
    assert not (survives < 3 and (tmp_path / "b.idx").exists())
