"""checkpoint/resume.py: which checkpoint a run goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint import CheckpointError, resume
from archscale_megatron.checkpoint.run_directory import check_run_directories
from tests.checkpoint.directories import write_checkpoint, write_run


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__0_0.distcp", 10)


def flip(checkpoint: Path) -> None:
    data = (checkpoint / "__1_1.distcp").read_bytes()
    (checkpoint / "__1_1.distcp").write_bytes(bytes([data[0] ^ 1]) + data[1:])


def half_write(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "metadata.json").unlink()


def arguments(run: Path | None, **given: object) -> Namespace:
    load = str(run) if run else None
    return Namespace(**({"load": load, "save": load, "ckpt_step": None, "pretrained_checkpoint": None} | given))


@pytest.mark.parametrize(
    "harm, reason",
    [
        (truncate, "iter_0000006/__0_0.distcp is truncated: 10 of 7,001 bytes"),
        (flip, "iter_0000006/__1_1.distcp is damaged: its digest differs"),
        (half_write, "iter_0000006 is half-written"),
        (shutil.rmtree, "iter_0000006 is missing"),
    ],
)
def test_falls_back_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], reason: str
) -> None:
    run = write_run(tmp_path / "run", 2, 4, 6)
    harm(run / "iter_0000006")
    args = arguments(run)
    resume.choose(args)
    assert args.ckpt_step == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"going on from iter_0000004 instead: {run}/{reason}" in lines[0]
    strict = arguments(run, ckpt_step=6)
    with pytest.raises(CheckpointError, match=f"--ckpt-step 6: .*{reason}"):
        resume.choose(strict)
    truncate(run / "iter_0000002")
    flip(run / "iter_0000004")
    with pytest.raises(CheckpointError, match=f"holds no whole checkpoint.*{reason}.*0004.*digest.*0002.*truncated"):
        resume.choose(arguments(run))


@pytest.mark.parametrize(
    "tracker, expected", [("6", 6), ("4", 4), ("", 6), ("\0\0", 6), (None, 6), ("8", 6), ("release", None)]
)
def test_tracker(tmp_path: Path, tracker: str | None, expected: int | None) -> None:
    """The tracker's, of a run that was rewound too; the newest, if it cannot be read or its checkpoint is gone."""
    run = write_run(tmp_path / "run", 2, 4, 6)
    write_checkpoint(run / "release")
    (run / resume.TRACKER).unlink()
    if tracker is not None:
        (run / resume.TRACKER).write_text(tracker)
    args = arguments(run)
    resume.choose(args)
    assert args.ckpt_step == expected
    assert resume.find_checkpoint(run) == run / ("release" if expected is None else f"iter_{expected:07d}")


def test_first_save_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "iter_0000002", whole=False)
    args = arguments(tmp_path)
    resume.choose(args)
    assert args.ckpt_step is None
    assert "starting anew" in capsys.readouterr().out


def test_without_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's own checkpoints load, with a warning; its old format is refused."""
    run = write_run(tmp_path / "run", 2, 4)
    (run / "iter_0000004" / "manifest.json").unlink()
    args = arguments(run)
    resume.choose(args)
    assert args.ckpt_step == 4
    assert "cannot be verified" in capsys.readouterr().out
    legacy = tmp_path / "old" / "iter_0000002"
    (legacy / "mp_rank_00").mkdir(parents=True)
    (legacy / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"pickle")
    (tmp_path / "old" / resume.TRACKER).write_text("2")
    for call in (lambda: resume.choose(arguments(legacy.parent)), lambda: resume.find_checkpoint(legacy)):
        with pytest.raises(CheckpointError, match="Megatron's old format, pickles, which are not read here"):
            call()


def test_find_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 4)
    assert resume.find_checkpoint(run) == run / "iter_0000004"
    assert resume.find_checkpoint(run / "iter_0000002") == run / "iter_0000002"
    truncate(run / "iter_0000004")
    assert resume.find_checkpoint(run) == run / "iter_0000002"
    copy = tmp_path / "of_another_name"
    shutil.copytree(run / "iter_0000002", copy)
    assert resume.find_checkpoint(copy) == copy
    for path, message in (
        (run / "iter_0000004", "is truncated"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resume.find_checkpoint(path)


def test_load_of_one_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 4)
    args = arguments(run / "iter_0000002")
    resume.split_load(args)
    assert (args.load, args.ckpt_step) == (str(run), 2)
    resume.choose(args)
    assert args.ckpt_step == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    write_checkpoint(tmp_path / "release")
    for given, message in (
        ({"load": str(run / "iter_0000002"), "ckpt_step": 4}, "contradict; give one"),
        ({"load": str(run), "ckpt_step": 3}, "iter_0000003 is missing"),
        ({"load": str(empty), "save": str(run)}, "there is no checkpoint; give another directory"),
        ({"load": str(tmp_path / "release")}, "or release beside a latest_checkpointed_iteration.txt that says so"),
    ):
        args = arguments(None, **given)
        with pytest.raises(CheckpointError, match=message):
            resume.split_load(args)
            resume.check_load(args)
    resume.check_load(arguments(empty))  # --load is --save: a fresh start
    (tmp_path / resume.TRACKER).write_text("release")
    args = arguments(tmp_path / "release")
    resume.split_load(args)
    assert (args.load, args.ckpt_step) == (str(tmp_path), None)


def test_pretrained_checkpoint(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", 2, 4), write_run(tmp_path / "other", 10, 12)
    empty = tmp_path / "empty"
    empty.mkdir()
    truncate(other / "iter_0000012")
    for load, expected in ((None, 10), (empty, 10), (run, 4)):
        args = arguments(load, pretrained_checkpoint=str(other))
        resume.choose(args)
        assert args.ckpt_step == expected


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """By what the run directory says, and of a checkpoint that was copied alone, by what it says itself."""
    run = write_run(tmp_path / "run", 4)
    arch = build_architecture("sambay", 8)
    (run / "iter_0000004" / "run.json").write_text(json.dumps({"architecture": dataclasses.asdict(arch)}))
    for given in ({"load": str(run)}, {"load": None, "save": None, "pretrained_checkpoint": str(run)}):
        args = arguments(None, **given)
        resume.split_load(args)
        args.architecture = arch
        check_run_directories(args)
        args.architecture = dataclasses.replace(arch, hidden_size=1, tied_embeddings=not arch.tied_embeddings)
        with pytest.raises(ValueError, match="another architecture: .*hidden_size is .*; tied_embeddings is") as error:
            check_run_directories(args)
        option = "--load" if given["load"] else "--pretrained-checkpoint"
        assert str(error.value).startswith(f"{option} {run} holds")
