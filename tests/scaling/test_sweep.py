"""Sweeps of a script that stands in for training: every way a point can end, what goes on afterwards, and how fast.
One sweep at the end trains."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters, training_flops
from archscale_megatron.scaling import sweep_commands
from archscale_megatron.scaling.__main__ import main
from archscale_megatron.scaling.check_points import check
from archscale_megatron.scaling.grid import Point, points_of
from archscale_megatron.scaling.results import assemble, locked, read_result
from archscale_megatron.scaling.runner import Settings, run_points, start
from archscale_megatron.scaling.slurm import read_point
from tests.launch import ROOT
from tests.scaling.stub_training import BATCH, ITERATIONS, loss
from tests.training.data import VOCABULARY, write_dataset

STUB = Path(__file__).with_name("stub_training.py")
FACTS = {
    "family": "sambay", "depth": 4, "train_name": "", "learning_rate": 1e-3, "base_learning_rate": 1e-3,
    "parameters": 1, "tokens": 2, "flops": 3.0, "samples": ITERATIONS * BATCH, "logged_samples": BATCH,
}  # fmt: skip


def settings(output: Path, **options: Any) -> Settings:
    return Settings(output=output, script=STUB, **options)


def grid(rates: list[float], *seeds: int) -> list[Point]:
    return points_of({"train-model": "sambay", "depth": 4}, {"lr": rates, "seed": list(seeds or (1,))})


def sweep(output: Path, points: list[Point], **options: Any) -> Counter[str]:
    return run_points(settings(output, **options), points, [FACTS] * len(points))


def started(output: Path) -> list[str]:
    return [line.split()[0] for line in (output / "starts").read_text().splitlines()]


def results(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_end_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    points = grid([2e-3], 100, 101, 102, 103, 104, 1, 2)
    counts = sweep(tmp_path, points, timeout=8, jobs=4, last=3)
    assert counts == {"failed": 2, "timeout": 1, "nan": 2, "done": 2}
    found = {int(line["seed"]): line for line in results(tmp_path)}
    assert {seed: line["status"] for seed, line in found.items()} == {
        100: "failed", 101: "timeout", 102: "nan", 103: "failed", 104: "nan", 1: "done", 2: "done",
    }  # fmt: skip
    assert found[100]["error"] == "exit code 1: RuntimeError: a planted failure"
    assert found[104]["error"] == "NaN in the loss of a micro-batch"
    assert "40 of 160 samples" in found[103]["error"]
    expected = math.fsum(loss(2e-3, i) for i in (18, 19, 20)) / 3
    assert float(found[1]["loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(found[1]["validation_loss"]) == pytest.approx(loss(2e-3, 20) + 0.5, rel=1e-6)
    assert [found[s]["loss"] for s in (100, 101, 102, 103, 104)] == [""] * 5
    assert found[1]["error"] == "" and 8 <= float(found[101]["seconds"]) < 30
    assert "train-model" not in found[1]  # the same for all points
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [str(line["seed"]) for line in lines] == [line["seed"] for line in results(tmp_path)]
    child = int(next(tmp_path.glob("*/child")).read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    # Started again: nothing, then with `retry` what failed, not what is finished or NaN.
    before = started(tmp_path)
    assert sweep(tmp_path, points, timeout=8) == counts
    assert started(tmp_path) == before
    sweep(tmp_path, [p for p in points if p.options["seed"] != ("101",)], timeout=8, retry=True, jobs=4)
    again = Counter(started(tmp_path)[len(before) :])
    assert set(again) == {p.name for p in points if p.options["seed"][0] in ("100", "103")}
    # Another definition of a finished point is another point.
    sweep(tmp_path, grid([2.5e-3], 1))
    assert len(results(tmp_path)) == 8


def run_sweep(output: Path, *options: str, rates: str = "1e-3,2e-3", seed: str = "1") -> list[str]:
    """A command line; the options of training must be legal, since they are checked."""
    command = [sys.executable, "-m", "archscale_megatron.scaling", "sweep", "--output", str(output)]
    training = f"--train-model sambay --depth 4 --seq-length 8 --micro-batch-size 1 --global-batch-size {BATCH} "
    training += f"--train-iters {ITERATIONS} --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --seed {seed}"
    return [*command, "--grid", f"lr={rates}", "--script", str(STUB), *options, "--", *training.split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sweep_kills_its_runs_and_resumes(tmp_path: Path, number: int) -> None:
    # A shell's background jobs, which these tests may be, ignore SIGINT.
    command = ["env", "--default-signal=INT", *run_sweep(tmp_path, "--jobs", "2", rates="1e-3", seed="101")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: bool(list(tmp_path.glob("*/child"))))
        time.sleep(0.3)
        child = int(next(tmp_path.glob("*/child")).read_text())
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    directory = next(tmp_path.glob("*/child")).parent
    assert read_result(directory) is None and len(started(tmp_path)) == 1
    # The half-done point starts again.
    point = Point({"train-model": ("sambay",), "lr": ("1e-3",), "seed": ("101",)})
    half_done = tmp_path / point.name / "tensorboard"
    half_done.mkdir(parents=True)
    (half_done / "old").touch()
    run = start(settings(tmp_path), point, FACTS, 0)
    assert run is not None and not (half_done / "old").exists()
    run.process.kill()
    run.process.wait()
    run.lock.close()


def test_two_sweeps_at_once_run_each_point_once(tmp_path: Path) -> None:
    points = grid([k * 1e-3 for k in range(1, 7)])
    both = [threading.Thread(target=sweep, args=(tmp_path, order)) for order in (points, points[::-1])]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(started(tmp_path)) == sorted(p.name for p in points)
    assert len(results(tmp_path)) == len(points)
    assert {line["status"] for line in results(tmp_path)} == {"done"}


def test_a_point_that_another_sweep_runs_is_left_alone(tmp_path: Path) -> None:
    (point,) = grid([1e-3])
    (tmp_path / point.name).mkdir()
    with locked(tmp_path / point.name / ".lock"):
        assert sweep(tmp_path, [point]) == {"another sweep's": 1}
    assert not (tmp_path / "starts").exists()
    assert sweep(tmp_path, [point]) == {"done": 1}


def test_jobs_divide_the_gpus(tmp_path: Path) -> None:
    sweep(tmp_path, grid([1e-3, 2e-3, 4e-3, 8e-3]), jobs=2, devices=("3", "5"))
    used = [line.split()[1] for line in (tmp_path / "starts").read_text().splitlines()]
    assert set(used) == {"3", "5"}
    four = Settings(tmp_path, STUB, jobs=2, processes=2, devices=("0", "1", "2", "3"))
    assert [four.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,1", "2,3"]
    assert four.command(grid([1e-3])[0])[1:6] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]


def test_slurm_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own command, as the tasks of an array would run it, at the same time."""
    monkeypatch.setattr(sweep_commands, "check", lambda points, _: [FACTS] * len(points))
    output = tmp_path / "a sweep"
    main(run_sweep(output, "--slurm", "--jobs", "2", "--timeout", "60", rates="1e-3,2e-3,3e-3")[3:])
    (script,) = output.glob("*.slurm")
    assert str(script) in capsys.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in script.read_text()
    main(run_sweep(tmp_path / "all", "--slurm", rates="1e-3,2e-3,3e-3")[3:])
    assert "#SBATCH --array=0-2\n" in next((tmp_path / "all").glob("*.slurm")).read_text()
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    tasks = [
        subprocess.Popen(["bash", str(script)], env=variables | {"SLURM_ARRAY_TASK_ID": str(index)}, cwd=tmp_path)
        for index in range(3)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0, 0]
    assert {line["status"] for line in results(output)} == {"done"} and len(results(output)) == 3
    main(run_sweep(output, "--slurm", rates="1e-3,2e-3,3e-3")[3:])
    assert "all points are finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--point 3: .* has points 0 to 2"):
        read_point(next(output.glob("*.json")), 3)


def test_list_and_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_commands, "check", lambda points, _: [FACTS] * len(points))
    main(run_sweep(tmp_path / "new", "--list")[3:])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4 and shown[0].endswith(": to do") and "--lr 1e-3" in shown[1]
    assert not (tmp_path / "new").exists()
    for options, error in [
        (["--jobs", "0"], "--jobs 0: must be 1 or more"),
        (["--timeout", "0"], "--timeout 0: must be more than 0"),
        (["--script", "none.py"], "--script none.py: no such file"),
        (["--point", "1"], "--point 1: needs --points"),
        (["--grid", "seed=1"], "seed: both fixed and in the grid"),
        (["--config", "x.yaml"], "not allowed with"),
        (["--grdi", "seed=1"], "--grdi"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(run_sweep(tmp_path, *options)[3:])
        (line,) = capsys.readouterr().err.splitlines()
        assert (ended.value.code, error in line) == (2, True), line


def test_values_are_checked_before_anything_runs() -> None:
    """The check's own process, of the real training script's options."""
    fixed = {
        "seq-length": 64, "micro-batch-size": 2, "global-batch-size": 8, "train-iters": 10, "lr": 1e-3,
        "mock-data": True, "tokenizer-type": "NullTokenizer", "train-name": "scaling_tie", "vocab-size": 128,
        "aspect-ratio": 8, "base-hps.warmup-tokens0": 0,
    }  # fmt: skip
    (point,) = points_of({**fixed, "train-model": "sambay", "depth": 4}, {})
    (facts,) = check([point], 1)
    arch = build_architecture("sambay", 4, aspect_ratio=8, vocab_size=128)
    assert facts == {
        "family": "sambay", "depth": 4, "train_name": "scaling_tie", "learning_rate": 1e-3, "base_learning_rate": 1e-3,
        "parameters": parameters(arch), "tokens": 10 * 8 * 64, "flops": training_flops(arch, 64) * 10 * 8 * 64,
        "samples": 80, "logged_samples": 8,
    }  # fmt: skip
    for wrong, error in [
        ({"train-model": "sambay", "depth": 6}, "--depth 6: the depth of sambay must be a multiple of 4"),
        ({"train-model": "sambay", "depth": 4, "dpeth": 4}, "--dpeth"),
        ({"train-model": "nosuch", "depth": 4}, "nosuch: unknown family"),
    ]:
        with pytest.raises(ValueError, match=error) as raised:
            check([point, *points_of({**fixed, **wrong}, {})], 1)
        assert "\n" not in str(raised.value) and str(raised.value).startswith("point ")


def test_real_training(tmp_path: Path) -> None:
    """A tiny model at three learning rates, of which the last diverges; then the curve."""
    data = write_dataset(tmp_path / "stdlib")
    training = f"""--train-model sambay --depth 4 --aspect-ratio 8 --head-dim 8 --local-window 16 --seq-length 32
        --vocab-size {VOCABULARY} --tokenizer-type NullTokenizer --data-path {data} --micro-batch-size 4
        --global-batch-size 4 --train-iters 12 --lr-decay-style constant --split 80,20,0 --eval-interval 12
        --eval-iters 1 --num-workers 0 --train-name scaling_tie --base-hps.warmup-tokens0 0""".split()
    output = tmp_path / "sweep"
    main(["sweep", "--output", str(output), "--grid", "lr=1e-3,1e-2,1e18", "--last", "4", "--", *training])
    found = {float(line["base_learning_rate"]): line for line in results(output)}
    assert {rate: line["status"] for rate, line in found.items()} == {1e-3: "done", 1e-2: "done", 1e18: "nan"}
    assert float(found[1e-2]["loss"]) < float(found[1e-3]["loss"]) < math.log(VOCABULARY) + 0.5
    assert "NaN" in found[1e18]["error"] or "nan" in found[1e18]["error"] or "finite" in found[1e18]["error"]
    assert float(found[1e-3]["validation_loss"]) > 1 and int(found[1e-3]["tokens"]) == 12 * 4 * 32
    main(["plot-lr", str(output / "results.csv"), "-o", str(tmp_path / "lr.png")])
    assert assemble(output) and (tmp_path / "lr.png").stat().st_size > 10_000
