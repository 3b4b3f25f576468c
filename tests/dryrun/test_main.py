"""The command, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.dryrun.runs import ROOT, dry_runs

MODEL = ["--train-model", "sambay", "--depth", "8", "--seq-length", "256", "--micro-batch-size", "1"]
# name: options, and what the error says
WRONG = {
    "no nodes": (["--nodes", "0", *MODEL], "--nodes 0: must be 1 or more"),
    "no such directory": ([*MODEL, "--json", "/no/such/directory/x"], "no directory /no/such/directory"),
    "unknown option": ([*MODEL, "--no-such-option"], "unrecognized arguments: --no-such-option"),
    "unknown family": (["--train-model", "gpt2", *MODEL[2:]], "gpt2: unknown family"),
    "no depth": (["--train-model", "sambay"], "--depth is required"),
    "tensor parallelism": ([*MODEL, "--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3"),
    "world size": ([*MODEL, "--gpus-per-node", "3", "--tensor-model-parallel-size", "2"], "start a multiple of 2"),
    "other linears": (
        [*MODEL, "--transformer-impl", "transformer_engine"],
        "--transformer-impl transformer_engine: the dry run counts --transformer-impl local; leave it out",
    ),
    "fp8": ([*MODEL, "--fp8-format", "hybrid"], "--fp8-format hybrid: the dry run counts bf16"),
    "flex": ([*MODEL, "--moe-token-dispatcher-type", "flex"], "flex: the dry run counts alltoall and allgather"),
    "dropped tokens": ([*MODEL, "--moe-expert-capacity-factor", "1"], "experts get equally many tokens and drop none"),
    "sinks of documents": (
        ["--train-model", "transformersa", *MODEL[2:], "--reset-at-eod", "--kernels", "torch"],
        "--reset-at-eod: documents with an attention sink are counted with --kernels fused alone",
    ),
    "warm-up": ([*MODEL, "--train-iters", "10", "--lr-warmup-iters", "10"], "--lr-warmup-iters 10"),
}


def test_refused_with_one_line_and_code_2() -> None:
    results = dry_runs([options for options, _ in WRONG.values()])
    for name, (code, errors), (_, message) in zip(WRONG, results, (w for w in WRONG.values()), strict=True):
        assert code == 2, (name, errors)
        assert message in errors.splitlines()[-1], (name, errors)


@pytest.mark.parametrize("to", ["-", "file"])
def test_command(to: str, tmp_path) -> None:
    """A training command with --nodes and --gpus-per-node in front, files and all."""
    path = "-" if to == "-" else str(tmp_path / "result.json")
    finished = subprocess.run(
        [
            sys.executable, "-m", "archscale_megatron.dryrun", "--nodes", "2", "--gpus-per-node", "4", "--json", path,
            *MODEL, "--bf16", "--pipeline-model-parallel-size", "2", "--global-batch-size", "16", "--lr", "1e-3",
            "--train-iters", "100", "--data-path", "nowhere", "--tokenizer-type", "SentencePieceTokenizer",
            "--tokenizer-model", "nowhere", "--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"),
            "--tensorboard-dir", str(tmp_path / "tensorboard"),
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    written = finished.stdout if to == "-" else (tmp_path / "result.json").read_text()
    result = json.loads(written)
    assert result["layout"]["ranks"] == 8 and result["layout"]["micro_batches"] == 4
    assert [stage["rank"] for stage in result["stages"]] == [0, 4]
    if to == "file":
        assert "sambay, depth 8, on 8 GPUs: tensor 1 x pipeline 2 x data 4" in finished.stdout
        assert f"parameters over all model-parallel ranks: {result['parameters']:,}" in finished.stdout
    assert sorted(tmp_path.iterdir()) == ([] if to == "-" else [tmp_path / "result.json"])
