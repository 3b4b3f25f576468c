"""The model's tensors of a checkpoint, written and read in one process; tests/hf/ has those of other layouts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archscale_megatron.checkpoint import CheckpointError, manifest
from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.tensors import CheckpointTensors, write_release
from archscale_megatron.hf import archscale
from tests.hf.cases import architecture

ARCH = architecture("sambay_gqa4_moe", False)


def random_tensors() -> dict[str, Tensor]:
    """Every parameter; in half precision but for what stays in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for one in archscale.maps(ARCH) for name, shape in one.megatron_shapes().items()}
    dtypes = {name: torch.float32 if name.endswith(("A_log", ".D")) else torch.bfloat16 for name in shapes}
    return {name: torch.randn(shape, generator=generator).to(dtypes[name]) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    directory, tensors = tmp_path_factory.mktemp("release") / "run", random_tensors()
    write_release(directory, ARCH, iter(tensors.items()), {"format": 1, "command": ["test"]})
    return directory, tensors


@pytest.fixture
def copy(written: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Of the checkpoint, to be damaged."""
    return Path(shutil.copytree(written[0], tmp_path / "copy")) / "release"


def test_what_was_written_is_read(written: tuple[Path, dict[str, Tensor]]) -> None:
    directory, expected = written
    checkpoint = find_checkpoint(directory)
    manifest.verify(checkpoint)
    tensors = CheckpointTensors(checkpoint)
    assert set(tensors.names()) == set(expected)
    for name, value in expected.items():
        read = tensors.read(name)
        assert tensors.shape(name) == tuple(value.shape) and tensors.dtype(name) == value.dtype == read.dtype
        assert torch.equal(read, value), name
    assert tensors.architecture == ARCH
    assert tensors.run == {"format": 1, "command": ["test"], "architecture": dataclasses.asdict(ARCH)}
    assert sorted(path.name for path in directory.iterdir()) == [
        "architecture.json", "latest_checkpointed_iteration.txt", "release",
    ]  # fmt: skip


def test_a_directory_that_is_not_empty_is_left_alone(written: tuple[Path, dict[str, Tensor]]) -> None:
    directory, tensors = written
    before = sorted(directory.rglob("*"))
    with pytest.raises(FileExistsError, match="not empty"):
        write_release(directory, ARCH, tensors.items(), {})
    assert sorted(directory.rglob("*")) == before


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(manifest, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_release(tmp_path / "run", ARCH, random_tensors().items(), {})
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_run_json(copy: Path) -> None:
    """As in checkpoints that are older than it: the run directory's."""
    (copy / "run.json").unlink()
    tensors = CheckpointTensors(copy)
    assert tensors.architecture == ARCH and tensors.run == {}
    (copy.parent / "architecture.json").unlink()
    with pytest.raises(CheckpointError, match="does not say what its architecture is"):
        CheckpointTensors(copy)


def test_an_architecture_of_another_release(copy: Path) -> None:
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"architecture": run["architecture"] | {"moons": 2}}))
    with pytest.raises(CheckpointError, match="moons"):
        CheckpointTensors(copy)


def test_files_that_cannot_be_read(copy: Path) -> None:
    tensors = CheckpointTensors(copy)
    with pytest.raises(CheckpointError, match="has no tensor decoder.nothing"):
        tensors.read("decoder.nothing")
    for path in copy.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"release: decoder.final_norm.weight cannot be read \(.+\)$"):
        tensors.read("decoder.final_norm.weight")
