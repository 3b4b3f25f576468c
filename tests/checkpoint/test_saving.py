"""checkpoint/saving.py on two ranks: whatever fails, wherever, both go on, and nothing whole is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.launch import torchrun

FULL = "No space left on device"
# Scenario of worker.py -> what stays whole, whether it failed, and the reason in the message.
EXPECTED = {
    "good": ([2], False, None),
    "data of rank 1": ([2], True, rf"{FULL} \(rank 1\)"),
    "data of rank 0": ([2], True, rf"{FULL} \(rank 0\)"),
    ".metadata": ([2], True, FULL),
    "metadata.json": ([2], True, FULL),
    "manifest": ([2], True, FULL),
    "directory is gone": ([2], True, "Not a directory"),
    "no directory": ([2], True, FULL),
    "replacing a whole one": ([2], True, rf"{FULL} \(rank 1\)"),
    "good again": ([2, 4], False, None),
    "replaced": ([2, 4], False, None),
    "asynchronous": ([2, 4, 6], False, None),
    "two asynchronous": ([2, 4, 6, 10], False, rf"{FULL} \(rank 1\)"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return torchrun(2, "-m", "tests.checkpoint.worker", str(tmp_path_factory.mktemp("saving")), timeout=280).stdout


def test_failures(output: str) -> None:
    said = ""
    results = {}
    for line in output.splitlines():
        if line.startswith("result "):
            result = json.loads(line.removeprefix("result "))
            results[result["name"]] = (result, said)
            said = ""
        elif "was not saved" in line:
            said += line + "\n"
    assert list(results) == list(EXPECTED)
    for name, (whole, failed, reason) in EXPECTED.items():
        result, said = results[name]
        assert result["whole"] == {f"iter_{iteration:07d}": True for iteration in whole}, name
        assert (result["tracker"], result["failed"], result["pending"]) == (str(whole[-1]), failed, 0), name
        assert said.count("\n") == (0 if reason is None else 1), name
        assert reason is None or re.search(f"checkpoint .* was not saved: .*{reason}", said), (name, said)
        if failed:
            assert "the last whole checkpoint is of iteration 2" in said, name


def test_ranks_agree_on_what_is_loaded(output: str) -> None:
    line = next(line for line in output.splitlines() if line.startswith("chosen "))
    assert json.loads(line.removeprefix("chosen ")) == [6, 6, "refused"]
    assert "going on from iter_0000006 instead" in output


def test_what_is_put_aside_comes_back(tmp_path: Path) -> None:
    """The program ends while a whole checkpoint is written again."""
    from archscale_megatron.checkpoint import manifest, retention
    from tests.checkpoint.directories import write_checkpoint, write_run

    run = write_run(tmp_path, 2, 4)
    retention.make_room(run / "iter_0000004")
    assert list(retention.checkpoints(run)) == [2]
    write_checkpoint(run / "iter_0000004", whole=False)
    retention.put_all_back(run)
    manifest.verify(run / "iter_0000004")
    retention.make_room(run / "iter_0000004")  # and after the manifest, before the old one is gone
    write_checkpoint(run / "iter_0000004", data=b"newer")
    retention.put_all_back(run)
    manifest.verify(run / "iter_0000004")
    assert (run / "iter_0000004" / "__0_0.distcp").read_bytes() == b"newer0"
    assert not list(run.glob(".replaced-*"))
