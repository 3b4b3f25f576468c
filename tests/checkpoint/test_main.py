"""python -m archscale_megatron.checkpoint: exit codes, names of bad files, and output for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archscale_megatron.checkpoint import manifest, run_description
from archscale_megatron.checkpoint.__main__ import main
from tests.checkpoint.directories import write_checkpoint, write_run

RUN = {
    "format": 1, "iteration": 4, "consumed_samples": 32, "time": "2026-01-01T00:00:00+00:00", "command": ["train.py"],
    "options": {"lr": 1e-3}, "architecture": {"family": "sambay", "depth": 8, "hidden_size": 64, "pattern": "m-W-"},
    "layout": {"world_size": 2}, "versions": {"torch": "2.13.0"}, "git": None, "tokenizer": {"type": "NullTokenizer"},
    "data": {"blend": ["text"], "split": "1,0,0", "seq_length": 64},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = write_run(tmp_path / "run", 2, 4)
    newest = directory / "iter_0000004"
    (newest / run_description.FILE_NAME).write_text(json.dumps(RUN))
    manifest.write(newest, {})
    return directory


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{run}/iter_0000002  whole", f"{run}/iter_0000004  whole"]
    os.truncate(run / "iter_0000002" / "__0_0.distcp", 5)
    assert main(["verify", str(run)]) == 1
    assert f"iter_0000002  bad: {run}/iter_0000002/__0_0.distcp is truncated: 5 of" in capsys.readouterr().out
    assert main(["verify", str(run / "iter_0000004"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"path": f"{run}/iter_0000004", "state": "whole", "problem": None},
    ]
    write_checkpoint(run / "iter_0000006", whole=False)
    assert main(["verify", str(run / "iter_0000006"), "--json"]) == 1
    assert "half-written" in json.loads(capsys.readouterr().out)[0]["problem"]


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith(f"{run}/iter_0000002  complete") and "the latest" not in first
    for text in ("the latest", "iteration 4, 2,048 tokens", "sambay of depth 8, 64 wide", "world_size 2", "data: text"):
        assert text in second
    assert main(["info", str(run / "iter_0000004"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["state"], report["latest"], report["consumed_tokens"]) == ("complete", True, 2048)
    assert report["architecture"] == RUN["architecture"]
    assert report["bytes"] == sum(path.stat().st_size for path in (run / "iter_0000004").iterdir())


@pytest.mark.parametrize("name, message", [("nowhere", "no such directory"), ("", "holds no checkpoint")])
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    for command in ("info", "verify"):
        with pytest.raises(SystemExit) as stop:
            main([command, str(tmp_path / name)])
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines() == [f"checkpoint: error: {tmp_path / name}: {message}"]


def test_program_needs_no_torch(run: Path) -> None:
    """It starts at once, on a login node too."""
    code = "import sys; sys.modules['torch'] = None; from archscale_megatron.checkpoint.__main__ import main; "
    finished = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main(['verify', {str(run)!r}]))"], capture_output=True, text=True
    )
    assert (finished.returncode, finished.stderr) == (0, "")
