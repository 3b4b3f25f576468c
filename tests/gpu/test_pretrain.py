"""pretrain_archscale.py on a GPU: goes on from a CPU's checkpoint with the CPU's losses, and from its own exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.launch import one_process
from tests.training.data import VOCABULARY, write_dataset
from tests.training.runs import scalars, tensors

pytestmark = pytest.mark.gpu

STEPS = 6
FAMILIES = ("transformer", "sambay", "sgdny", "mambay2", "sambayda", "phi4miniflash")
WITH_DOCUMENTS = ("sambay", "sgdny", "mambay2", "phi4miniflash")
# Of the loss. A GPU and a CPU sum in other orders; bf16 rounds to 2^-9 of a value.
FP32, BF16 = 1e-5, 2**-9
LATE = float(os.environ.get("LAUNCH_SECONDS", 300))  # then a launch fails, and shows where it stood
# A pool of compiling processes for each launch would be more than all other work.
ON_GPU = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
DETERMINISTIC = ON_GPU | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def command(data: Path, run: Path, family: str, *options: str) -> list[str]:
    """Documents of 100 tokens on average, sequences of 256, a window of 32."""
    return [
        "pretrain_archscale.py", "--train-model", family, "--depth", "8", "--aspect-ratio", "16", "--head-dim", "16",
        "--num-heads", "8", "--num-kv-heads", "4", "--local-window", "32", "--vocab-size", str(VOCABULARY),
        "--data-path", str(data), "--tokenizer-type", "NullTokenizer", "--split", "100,0,0", "--eval-iters", "0",
        "--seq-length", "256", "--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", str(STEPS),
        "--lr", "1e-3", "--lr-warmup-iters", "1", "--clip-grad", "1.0", "--use-distributed-optimizer",
        "--save", str(run), "--save-interval", "1", "--log-interval", "1", "--tensorboard-log-interval", "1",
        "--tensorboard-dir", str(run / "tensorboard"), "--num-workers", "1", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib", documents=120, characters=100)


@pytest.mark.parametrize(
    ("family", "documents"),
    [(family, False) for family in FAMILIES] + [(family, True) for family in WITH_DOCUMENTS],
)
def test_losses_are_the_cpus(family: str, documents: bool, data: Path, tmp_path: Path) -> None:
    """Five iterations from the same checkpoint. The first iteration of the run has the learning rate 0."""
    assert torch.cuda.is_available(), "needs a GPU"
    options = ["--reset-at-eod"] if documents else []
    one_process(*command(data, tmp_path / "cpu", family, *options), timeout=LATE, **WITHOUT_GPU)
    start = str(tmp_path / "cpu" / "iter_0000001")
    expected = scalars(tmp_path / "cpu", "lm loss")
    del expected[1]
    errors = {}
    for name, precision in {"fp32": [], "bf16": ["--bf16"]}.items():
        resumed = command(data, tmp_path / name, family, *options, *precision, "--resume", start)
        one_process(*resumed, timeout=LATE, **ON_GPU)
        found = scalars(tmp_path / name, "lm loss")
        assert found.keys() == expected.keys()
        errors[name] = max(abs(found[step] / loss - 1) for step, loss in expected.items())
    print(f"\n{family}{' with documents' * documents}: losses {list(expected.values())}, off by {errors}")
    assert expected[STEPS] < expected[2]
    assert errors["fp32"] < FP32 and errors["bf16"] < BF16


@pytest.mark.parametrize("options", [[], ["--reset-at-eod"], ["--recompute-granularity", "full"]])
@pytest.mark.parametrize("family", ["transformer", "sambay"])
def test_deterministic_resume_is_exact(family: str, options: list[str], data: Path, tmp_path: Path) -> None:
    """bf16, from the third iteration: the losses, every weight and every moment."""
    if "--recompute-granularity" in options:
        options = [*options, "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    options = ["--bf16", "--deterministic-mode", *options]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    one_process(*command(data, whole, family, *options), timeout=LATE, **DETERMINISTIC)
    start = str(whole / "iter_0000003")
    one_process(*command(data, resumed, family, *options, "--resume", start), timeout=LATE, **DETERMINISTIC)
    expected = scalars(whole, "lm loss")
    assert scalars(resumed, "lm loss") == {step: expected[step] for step in range(4, STEPS + 1)}
    found, expected_tensors = tensors(resumed, STEPS), tensors(whole, STEPS)
    assert found.keys() == expected_tensors.keys()
    assert [key for key, value in expected_tensors.items() if not torch.equal(found[key], value)] == []
