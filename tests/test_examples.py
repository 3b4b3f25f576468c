"""Every example starts a command that the program accepts, at the number of processes that it is for."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_lines import ROOT, Command, errors_of, example_command

EIGHT = ROOT / "examples/sambay_d16_8gpu.sh"
SLURM = ROOT / "examples/sambay_128nodes.slurm"
BLEND = ROOT / "examples/blend.sh"

# (script, options, environment, processes, what the error says or None)
CASES: dict[str, tuple[Path, list[str], dict[str, str], int, str | None]] = {
    "8gpu": (EIGHT, [], {}, 8, None),
    "8gpu, paths": (EIGHT, [], {"DATA": "/data/a b", "TOKENIZER": "/data/t.model"}, 8, None),
    "8gpu, tp 2": (EIGHT, [], {"TP": "2"}, 8, None),
    "8gpu, tp 4": (EIGHT, [], {"TP": "4"}, 8, None),
    "8gpu, tp 8": (EIGHT, [], {"TP": "8"}, 8, "has 4 key-value heads to split; use 1, 2, 4"),
    "8gpu, batch 500": (EIGHT, ["--global-batch-size", "500"], {}, 8, "must be a multiple of"),
    "8gpu, layers": (EIGHT, ["--num-layers", "24"], {}, 8, "--num-layers 24 contradicts"),
    "8gpu, misspelt": (EIGHT, ["--micro-batchsize", "4"], {}, 8, "--micro-batchsize"),
    "128 nodes": (SLURM, [], {}, 1024, None),
    "127 nodes": (SLURM, [], {"SLURM_JOB_NUM_NODES": "127"}, 1016, "must be a multiple of"),
    "128 nodes, tp 4": (SLURM, ["--tensor-model-parallel-size", "4"], {}, 1024, "use 1, 2, 3, 6"),
    "128 nodes, pp 2": (SLURM, ["--pipeline-model-parallel-size", "2"], {}, 1024, None),
    "blend": (BLEND, [], {}, 8, None),
    "blend, splits": (BLEND, [], {"SPLITS": "given"}, 8, None),
    "blend, 1 gpu": (BLEND, ["--train-iters", "1000"], {"GPUS": "1"}, 1, None),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    return {
        name: example_command(script, tmp_path_factory.mktemp("example"), *options, **environment)
        for name, (script, options, environment, _, _) in CASES.items()
    }


@pytest.fixture(scope="module")
def errors(commands: dict[str, Command]) -> dict[str, str | None]:
    return dict(zip(commands, errors_of(list(commands.values())), strict=True))


def test_every_example_is_here() -> None:
    scripts = {p for p in (ROOT / "examples").iterdir() if p.suffix in (".sh", ".slurm")}
    assert scripts == {script for script, *_ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_command(name: str, commands: dict[str, Command], errors: dict[str, str | None]) -> None:
    *_, processes, expected = CASES[name]
    assert commands[name][1] == processes
    if expected is None:
        assert errors[name] is None
    else:
        assert errors[name] is not None and expected in errors[name]
        assert "\n" not in errors[name]


def test_values_reach_the_program(commands: dict[str, Command]) -> None:
    def value(name: str, option: str) -> str:
        arguments = commands[name][0]
        return arguments[arguments.index(option) + 1]

    assert value("8gpu, paths", "--data-path") == "/data/a b"
    assert value("8gpu, paths", "--tokenizer-model") == "/data/t.model"
    assert commands["8gpu, layers"][0][-2:] == ["--num-layers", "24"]
    assert "--sequence-parallel" in commands["8gpu, tp 2"][0]
    assert "--sequence-parallel" not in commands["8gpu"][0]


@pytest.mark.parametrize("name, depth", [("8gpu", 16), ("128 nodes", 24), ("blend", 8)])
def test_budget_is_archscales(name: str, depth: int, commands: dict[str, Command]) -> None:
    """Tokens grow with the non-embedding parameters, 1e11 for the transformer of depth 16; 1e9 warm up."""
    arguments = commands[name][0]

    def number(option: str) -> int:
        return int(arguments[arguments.index(option) + 1])

    batch = number("--global-batch-size") * number("--seq-length")
    assert batch == 2**21
    assert number("--depth") == depth
    tokens = 1e11 * (14.5 * 124**2 + 144 * 124) * depth**3 / (237568 * 16**3)
    assert number("--train-iters") == int(tokens) // batch
    assert number("--lr-warmup-iters") == round(1e9 / batch)


@pytest.mark.parametrize("signalled", [True, False])
def test_slurm_job_returns_to_the_queue_only_at_its_time_limit(tmp_path: Path, signalled: bool) -> None:
    """SIGTERM goes on to the step, which here exits 3 on it; then the job is requeued. A step that fails by
    itself ends the job with its status."""
    log = tmp_path / "log"
    stubs = {
        "srun": "trap 'echo saved >> LOG; exit 3' TERM; echo started >> LOG; "
        + ("while :; do sleep 0.05; done" if signalled else "exit 3"),
        "scontrol": '[ "$1" = show ] && echo node0001 || echo "$@" >> LOG',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body.replace('LOG', str(log))}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        "SLURM_JOB_NODELIST": "node0001",
        "SLURM_JOB_ID": "7",
    }
    job = subprocess.Popen(["bash", str(SLURM)], env=environment, cwd=ROOT)
    if signalled:
        deadline = time.monotonic() + 30
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.terminate()
    status = job.wait(timeout=30)
    assert log.read_text().split("\n")[:-1] == (["started", "saved", "requeue 7"] if signalled else ["started"])
    assert status == (0 if signalled else 3)
