"""Shards against safetensors itself, and what is left when writing fails."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from archscale_megatron.checkpoint.new_directory import new_directory
from archscale_megatron.hf.folder import HFError, HFFolder
from archscale_megatron.hf.shards import Entry, write_json, write_shards
from tests.hf.test_folder import assert_bitwise

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    """400, 400, 200, 1200 and 4 bytes; parts of one storage, transposed, and of no dimension."""
    draw = torch.Generator().manual_seed(1)
    fused = torch.randn(20, 10, generator=draw)
    return {
        "q": fused[:10], "k": fused[10:].T, "half": torch.randn(100, generator=draw).bfloat16(),
        "large": torch.randn(300, generator=draw), "scalar": torch.tensor(3.0),
    }  # fmt: skip


def entries(of: dict[str, Tensor]) -> list[Entry]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in of.items()]


@pytest.mark.parametrize(
    "limit, files",
    [
        (5000, [["q", "k", "half", "large", "scalar"]]),
        (1000, [["q", "k", "half"], ["large"], ["scalar"]]),
        (999, [["q", "k"], ["half"], ["large"], ["scalar"]]),
        (1, [["q"], ["k"], ["half"], ["large"], ["scalar"]]),
    ],
)
def test_writes_shards_of_at_most_the_limit(tmp_path: Path, limit: int, files: list[list[str]]) -> None:
    given = tensors()
    with new_directory(tmp_path / "x") as directory:
        write_shards(directory, iter(given.items()), entries(given), limit)
        write_json(directory / "config.json", {})
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    assert [sorted(load_file(tmp_path / "x" / name)) for name in names] == [sorted(file) for file in files]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted(
        ["config.json", *names, *([INDEX] if len(files) > 1 else [])]
    )
    if len(files) > 1:
        index = json.loads((tmp_path / "x" / INDEX).read_text())
        assert index == {
            "metadata": {"total_size": 2204},
            "weight_map": {tensor: name for name, file in zip(names, files, strict=True) for tensor in file},
        }
    folder = HFFolder(tmp_path / "x")
    folder.check({name: tuple(tensor.shape) for name, tensor in given.items()})
    for name, tensor in given.items():
        assert_bitwise(folder.read(name), tensor)


def test_a_shard_is_the_file_that_safetensors_makes(tmp_path: Path) -> None:
    """Byte for byte: the same header, the same order, aligned."""
    given = tensors() | {"odd": torch.ones(3, dtype=torch.float16), "wide": torch.ones(2, dtype=torch.float64)}
    given = {name: tensor.contiguous().clone() for name, tensor in given.items()}
    with new_directory(tmp_path / "x") as directory:
        write_shards(directory, iter(given.items()), entries(given))
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """When a tensor is asked for, all earlier ones are written."""
    written = []

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for name in "abcdef":
            files = sorted(directory.glob("*.safetensors"))
            written.append(sum(file.read_bytes().count(torch.ones(10).numpy().tobytes()) for file in files))
            yield name, torch.ones(10)

    with new_directory(tmp_path / "x") as directory:
        write_shards(directory, arriving(), [(name, (10,), torch.float32) for name in "abcdef"], 80)
    assert written == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda given: given | {"k": given["k"].bfloat16()},
        lambda given: given | {"k": given["k"][:1]},
        lambda given: dict(reversed(given.items())),
        lambda given: dict(list(given.items())[:-1]),
        lambda given: given | {"more": torch.zeros(1)},
    ],
    ids=["dtype", "shape", "order", "too few", "too many"],
)
def test_leaves_nothing_of_tensors_that_are_not_the_expected_ones(tmp_path: Path, wrong: object) -> None:
    given = tensors()
    with pytest.raises(ValueError), new_directory(tmp_path / "x") as directory:
        write_shards(directory, iter(wrong(given).items()), entries(given), 500)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_leaves_nothing_on_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the write in the same way."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(HFError, match="cannot write model-00002-of-00002"), new_directory(tmp_path / "x") as path:
            given = {"small": torch.zeros(10), "large": torch.zeros(100_000)}
            write_shards(path, iter(given.items()), entries(given), 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_says_beforehand_that_the_disk_is_too_small(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).total
    with (
        pytest.raises(HFError, match="the weights take .* bytes, and the disk has"),
        new_directory(tmp_path / "x") as d,
    ):
        write_shards(d, iter(()), [("a", (size,), torch.float32)])
    assert list(tmp_path.iterdir()) == []


def test_new_directory_takes_an_empty_one_and_no_other(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    with new_directory(empty) as path:
        assert path.parent == tmp_path
        (path / "file").write_text("")
    assert [p.name for p in empty.iterdir()] == ["file"]
    full.mkdir(mode=0o700)
    (full / "file").write_text("")
    for target, message in ((full, "not empty"), (full / "file", "not a directory")):
        with pytest.raises(FileExistsError, match=message), new_directory(target):
            raise AssertionError
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "interrupted"):
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
