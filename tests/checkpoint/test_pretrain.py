"""pretrain_archscale.py: what stays, from where a run goes on, and what happens when nothing can be written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint import manifest, retention
from archscale_megatron.checkpoint.resume import TRACKER
from tests.checkpoint.evil import Evil
from tests.launch import ROOT, torchrun
from tests.training.data import VOCABULARY, write_dataset
from tests.training.test_pretrain import STEPS, command, tensors

OPTIONS = ("--save-interval", "2", "--keep-last", "2", "--save-retain-interval", "4", "--resume", "auto")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STEPS steps on two processes, with dropout."""
    directory = tmp_path_factory.mktemp("run")
    torchrun(2, *command(data, directory, *OPTIONS))
    return directory


def same_tensors(one: Path, other: Path, iteration: int) -> bool:
    found, expected = tensors(one, iteration), tensors(other, iteration)
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_stays_says_what_made_it(run: Path) -> None:
    kept = retention.checkpoints(run)
    assert list(kept) == [4, 6, 8] and (run / TRACKER).read_text() == "8"
    assert not list(run.glob(".*"))
    for iteration, checkpoint in kept.items():
        manifest.verify(checkpoint)
        assert not list(checkpoint.glob("*.digest"))
        made_by = json.loads((checkpoint / "run.json").read_text())
        assert (made_by["iteration"], made_by["consumed_samples"]) == (iteration, 8 * iteration)
    arch = build_architecture("sambay", 8, aspect_ratio=8, head_dim=8, local_window=16, vocab_size=VOCABULARY)
    assert made_by["architecture"]["pattern"] == arch.pattern
    assert made_by["layout"]["world_size"] == made_by["layout"]["data"] == 2
    assert made_by["command"][0] == "pretrain_archscale.py" and made_by["options"]["keep_last"] == 2
    assert made_by["versions"]["megatron-core"] == "0.19.2" and made_by["data"]["split"] == "80,10,10"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (made_by["git"] or {"commit": ""})["commit"] == commit


def test_goes_on_from_the_newest_whole_one(run: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    os.truncate(copy / "iter_0000008" / "__1_0.distcp", 1000)
    flipped = copy / "iter_0000006" / "__1_0.distcp"
    content = bytearray(flipped.read_bytes())
    content[-1000] ^= 1
    flipped.write_bytes(content)
    said = [line for line in torchrun(2, *command(data, copy, *OPTIONS)).stdout.splitlines() if "not whole" in line]
    assert len(said) == 2 and all("going on from iter_0000004 instead" in line for line in said)
    assert "iter_0000008/__1_0.distcp is truncated" in said[0]
    assert "iter_0000006/__1_0.distcp is damaged" in said[1]
    assert list(retention.checkpoints(copy)) == [4, 6, STEPS]
    assert same_tensors(copy, run, STEPS)


def test_training_goes_on_when_nothing_can_be_saved(run: Path, data: Path, tmp_path: Path) -> None:
    """No file may be longer than 2 MB; then, without that limit, the same command starts anew, and saves asynchronously
    what a synchronous save has."""
    directory = tmp_path / "run"
    asynchronous = ("--async-save", "--use-persistent-ckpt-worker")
    arguments = command(data, directory, *OPTIONS, "--exit-interval", "4", "--eval-interval", "100", *asynchronous)
    synchronous = [argument for argument in arguments if argument not in asynchronous]
    finished = torchrun(2, *synchronous, prefix=("prlimit", "--fsize=2000000"), check=False)
    failures = [line for line in finished.stdout.splitlines() if "was not saved" in line]
    assert len(failures) == 2 and all("File too large" in line and "there is no other" in line for line in failures)
    assert "iteration        4/" in finished.stdout and finished.returncode == 1
    assert not retention.checkpoints(directory) and not (directory / TRACKER).exists()
    torchrun(2, *arguments)
    assert list(retention.checkpoints(directory)) == [2, 4]
    for checkpoint in retention.checkpoints(directory).values():
        manifest.verify(checkpoint)
    assert same_tensors(directory, run, 4)


def test_refused_with_one_line(run: Path, data: Path, tmp_path: Path) -> None:
    """A directory in which nothing can be written, before training; and a checkpoint that would run code."""
    (tmp_path / "file").write_text("no directory")
    copy, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(run, copy)
    (copy / "iter_0000008" / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    manifest.write(copy / "iter_0000008", {})
    for directory, processes, message in (
        (tmp_path / "file" / "run", 1, "cannot be written (Not a directory); give a directory that can"),
        (copy, 2, "/.metadata holds posix.mkdir, which may run code; it was not read"),
    ):
        finished = torchrun(processes, *command(data, directory, *OPTIONS), check=False)
        said = [line for line in finished.stdout.splitlines() if "pretrain_archscale: error: " in line]
        assert len(said) == 1 and message in said[0], finished.stdout[-3000:]
        assert "exitcode  : 2" in finished.stdout and "]: Traceback" not in finished.stdout
    assert not ran.exists()
