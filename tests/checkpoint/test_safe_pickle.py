"""checkpoint/safe_pickle.py: what a checkpoint says is read, what it would do is not done."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.rerun_state_machine import Call, Caller, RerunDiagnostic, RerunMode, RerunState
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint import CheckpointError, safe_pickle
from archscale_megatron.mup.rules import Parametrization
from tests.checkpoint.evil import PLACES, Evil, write_evil


@pytest.mark.parametrize("place", PLACES)
def test_evil_is_refused_wherever_it_is(tmp_path: Path, place: str) -> None:
    ran = tmp_path / "ran"
    directory = write_evil(tmp_path / "iter_0000001", place, ran)

    def read_rng_state() -> None:
        checkpoint.load({"rng_state/shard_0_1": io.BytesIO()}, storage_reader=FileSystemReader(directory), no_dist=True)

    reads: list[Callable[[], Any]] = {
        ".metadata": [
            lambda: safe_pickle.read_metadata(directory),
            lambda: FileSystemReader(directory).read_metadata(),
        ],
        "rng_state": [read_rng_state],
        "common_state": [lambda: dist_checkpointing.load_common_state_dict(str(directory))],
        "common.pt": [lambda: dist_checkpointing.load_common_state_dict(str(directory))],
    }[place]
    for read in reads:
        error = pickle.UnpicklingError if place == "common.pt" else CheckpointError  # Megatron's old format
        with pytest.raises(error, match="posix.mkdir") as caught:
            read()
        assert not ran.exists()
        assert place == "common.pt" or ("\n" not in str(caught.value) and place in str(caught.value))
    assert isinstance(pickle.loads(pickle.dumps(Evil(ran))), type(None)) and ran.exists()  # and it would have


def test_metadata_of_torch_is_read(tmp_path: Path) -> None:
    state = {f"of {dtype}": torch.zeros(4, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    checkpoint.save({**state, "object": [1]}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    found = safe_pickle.read_metadata(tmp_path)
    expected = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "", "..", "a/b"])
def test_metadata_points_into_the_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint.save({"object": [1]}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is no file of the checkpoint"):
        safe_pickle.read_metadata(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is damaged"),
        (b"garbage", "is damaged"),
        (pickle.dumps({"a": 1}), "holds dict, not a checkpoint's metadata"),
        (pickle.dumps(Metadata(state_dict_metadata=[])), "holds Metadata"),  # type: ignore[arg-type]
        (b"cbuiltins\neval\n(S'1'\ntR.", "holds builtins.eval, which may run code"),
        (b"ctorch\nload\n.", "holds torch.load, which may run code"),
        (b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93.", "holds torch.Size.__init__, which may run code"),
        (None, "is missing"),
    ],
)
def test_bad_metadata(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safe_pickle.read_metadata(tmp_path)


def test_objects_of_a_training_checkpoint() -> None:
    """Arguments with ours among them, and what Megatron's rerun machine saves after a NaN."""
    values: list[Any] = [
        Namespace(architecture=build_architecture("sambay", 8), parametrization=Parametrization("mup++"), bf16=True),
        {
            "where": Caller("loss", 3), "call": Call(Caller("loss", 3), 1),
            "diagnostic": RerunDiagnostic.CORRECT_RESULT, "mode": RerunMode.VALIDATE_RESULTS,
            "state": RerunState.NOT_RUNNING_YET, "device": torch.device("cpu"), "loss": torch.tensor(float("nan")),
        },
    ]  # fmt: skip
    for value in values:
        safe_pickle.check_loadable(value, "object")
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        assert repr(safe_pickle.load_object(file, "object")) == repr(value)
    with pytest.raises(CheckpointError, match="rng_state in the checkpoint is damaged"):
        safe_pickle.load_object(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]), "rng_state")


def test_what_could_not_be_loaded_is_not_saved() -> None:
    with pytest.raises(CheckpointError, match="these arguments in the checkpoint holds torch.nn.modules.linear.Linear"):
        safe_pickle.check_loadable(Namespace(odd=torch.nn.Linear(1, 1)), "these arguments")
