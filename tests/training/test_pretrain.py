"""pretrain_archscale.py as users run it: checkpoints, exact resume, other layouts, logs. Faults are in tests/faults."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import training_flops
from tests.launch import torchrun
from tests.training.data import VOCABULARY, write_dataset
from tests.training.runs import scalars, tensors

SEQUENCE_LENGTH, BATCH, STEPS, SAVED_AT = 64, 8, 8, 4
MODEL = ["--train-model", "sambay", "--depth", "8", "--aspect-ratio", "8", "--head-dim", "8", "--local-window", "16"]
FOUR = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib")


def command(data: Path, run: Path, *options: str) -> list[str]:
    return [
        "pretrain_archscale.py", *MODEL, "--vocab-size", str(VOCABULARY), "--data-path", str(data),
        "--tokenizer-type", "NullTokenizer", "--seq-length", str(SEQUENCE_LENGTH), "--micro-batch-size", "2",
        "--global-batch-size", str(BATCH), "--train-iters", str(STEPS), "--lr", "1e-3", "--clip-grad", "1.0",
        "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--use-distributed-optimizer",
        "--save", str(run), "--load", str(run), "--save-interval", str(SAVED_AT), "--eval-interval", "4",
        "--eval-iters", "2", "--log-interval", "1", "--tensorboard-dir", str(run / "tensorboard"),
        "--tensorboard-log-interval", "1", "--log-throughput", "--num-workers", "1", "--split", "80,10,10", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STEPS steps on four processes without a break, with dropout."""
    run = tmp_path_factory.mktemp("undisturbed")
    (run / "log").write_text(torchrun(4, *command(data, run, *FOUR)).stdout)
    return run


def go_back(run: Path, copy: Path) -> None:
    """A copy of `run` as it was after the first checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / f"iter_{STEPS:07d}")
    (copy / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))


def test_resume_at_another_layout(data: Path, tmp_path: Path) -> None:
    """Without dropout, whose masks belong to a layout: a checkpoint of TP 2 x PP 2 goes on as PP 1 x DP 2."""
    plain = ("--hidden-dropout", "0", "--attention-dropout", "0")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    torchrun(4, *command(data, whole, *FOUR, *plain))
    go_back(whole, moved)
    torchrun(2, *command(data, moved, *plain))
    found, expected = scalars(moved, "lm loss"), scalars(whole, "lm loss")
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-5)


def test_experts_resume_at_another_layout(data: Path, tmp_path: Path) -> None:
    """A checkpoint of EP 2 goes on as PP 2, and the balance of the experts' load is in the log."""
    plain = (
        "--train-model", "sambay_gqa4_moe", "--aspect-ratio", "9", "--sparsity", "3", "--top-k", "3",
        "--shared-expert", "--sqrt-gate", "--hidden-dropout", "0", "--attention-dropout", "0",
    )  # fmt: skip
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    torchrun(2, *command(data, whole, *plain, "--expert-model-parallel-size", "2"))
    go_back(whole, moved)
    log = torchrun(2, *command(data, moved, *plain, "--pipeline-model-parallel-size", "2")).stdout
    for tag in ("lm loss", "load_balancing_loss"):
        found, expected = scalars(moved, tag), scalars(whole, tag)
        assert found.keys() | set(range(1, SAVED_AT + 1)) == expected.keys() == set(range(1, STEPS + 1))
        assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
    assert all(1 < value < 2 for value in expected.values())  # 1 is an even load
    assert re.search(r"load_balancing_loss: 1\.\d", log)


def test_logs(undisturbed: Path) -> None:
    log = (undisturbed / "log").read_text()
    losses = scalars(undisturbed, "lm loss")
    assert losses[STEPS] < losses[1] - 0.3
    assert set(scalars(undisturbed, "lm loss validation")) == {4, 8}
    speed = scalars(undisturbed, "tokens-per-second")
    assert set(speed) == set(range(1, STEPS + 1))
    flops = scalars(undisturbed, "model-flops-per-second-per-device")
    arch = build_architecture("sambay", 8, aspect_ratio=8, head_dim=8, local_window=16, vocab_size=VOCABULARY)
    per_token = training_flops(arch, SEQUENCE_LENGTH)
    assert flops[STEPS] * 4 == pytest.approx(speed[STEPS] * per_token, rel=1e-4)
    # Megatron's own clock: milliseconds an iteration, in the line that follows ours.
    milliseconds = float(re.findall(r"iteration \(ms\): ([0-9.]+)", log)[-1])
    assert speed[STEPS] == pytest.approx(BATCH * SEQUENCE_LENGTH / milliseconds * 1e3, rel=0.05)


def test_run_directory_says_what_it_holds(undisturbed: Path) -> None:
    stored = json.loads((undisturbed / "architecture.json").read_text())
    assert (stored["family"], stored["depth"], stored["pattern"]) == ("sambay", 8, "m-W-m-W-m-*-U-X-")


def test_documents_reach_every_stage(tmp_path: Path) -> None:
    """--reset-at-eod over 2 x 2 virtual stages, whose inner two read no batches otherwise, and 2 tensor-parallel ranks,
    of which the second never reads any."""
    short = write_dataset(tmp_path / "short", documents=200, characters=24)
    plain = ("--hidden-dropout", "0", "--attention-dropout", "0", "--train-iters", "2", "--eval-interval", "2")
    stages = (*FOUR, "--num-virtual-stages-per-pipeline-rank", "2")
    launches = {
        "one document": (1, ()),
        "documents": (1, ("--reset-at-eod",)),
        "stages": (4, ("--reset-at-eod", *stages)),
    }
    losses = {}
    for name, (processes, options) in launches.items():
        torchrun(processes, *command(short, tmp_path / name, *plain, *options))
        losses[name] = [scalars(tmp_path / name, f"lm loss{of}") for of in ("", " validation")]
    for found, expected, without in zip(*(losses[n] for n in ("stages", "documents", "one document")), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert without[2] != pytest.approx(expected[2], rel=1e-4)


def test_bf16_with_virtual_stages_resumes_exactly(data: Path, tmp_path: Path) -> None:
    """Parameters of two dtypes (A_log stays fp32), and more than one model chunk a rank."""
    options = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2", "--bf16")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    torchrun(2, *command(data, whole, *options))
    go_back(whole, resumed)
    torchrun(2, *command(data, resumed, *options))
    losses = scalars(whole, "lm loss")
    assert losses[STEPS] < losses[1] - 0.3
    assert scalars(resumed, "lm loss") == losses
    found, expected = tensors(resumed, STEPS), tensors(whole, STEPS)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
