"""The command: its report, its picture, what it refuses, and what a kill costs."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale_megatron.evaluation import perplexity, report
from tests.evaluation import killed
from tests.evaluation.commands import run
from tests.evaluation.engines import KnownEngine
from tests.evaluation.test_report import run_directory
from tests.evaluation.test_texts import byte_tokenizer
from tests.hf.models import architecture, build
from tests.launch import ROOT

TEXT = "the theory of the cat, and the hat that the cat has\n" * 5


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> KnownEngine:
    from archscale_megatron.evaluation import options

    engine = KnownEngine(lambda token, context: 1 + 1 / context, byte_tokenizer(), max_length=48)
    monkeypatch.setattr(options, "open_engine", lambda args: engine)
    return engine


def reports(directory: Path) -> list[report.Report]:
    return [report.read(path) for path in sorted(directory.glob("*.json"))]


def test_a_model_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an export to the report: the numbers of the model itself, all windows at once."""
    tokenizer = byte_tokenizer()
    model = build(dataclasses.replace(architecture("sambay"), vocab_size=len(tokenizer)))
    model.float().save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(json.dumps(model.config.to_dict() | {"eos_token_id": 0}))
    tokenizer.save_pretrained(tmp_path / "export")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("another text")
    data = [tmp_path / "a.txt", tmp_path / "b.txt"]
    run(
        perplexity, "--load", tmp_path / "export", "--data", *data, "--windows", "8,18,500", "--stride", 7,
        "--join", "-o", tmp_path / "loss.png",
    )  # fmt: skip
    (written,) = reports(tmp_path / "export" / "evaluation")
    model.double()
    ids = torch.tensor([*tokenizer(TEXT).input_ids, 0, *tokenizer("another text").input_ids])
    with torch.inference_mode():
        logprobs = model(ids[None, :-1]).logits[0].double().log_softmax(-1).gather(-1, ids[1:, None])
    expected = -logprobs.mean().item()
    assert written.scores["loss@500"].value == pytest.approx(expected, rel=1e-5)
    size = len(TEXT) + len("another text") - len("the")
    assert written.scores["bits_per_byte@500"].value == pytest.approx(
        expected * (len(ids) - 1) / math.log(2) / size, rel=1e-5
    )
    assert written.scores["loss@8"].n == written.scores["loss@18"].n == len(ids) - 1
    assert written.options["windows"] == [8, 18, 500] and written.options["join"]
    assert written.checkpoint["fingerprint"] == report.fingerprint(tmp_path / "export")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "perplexity@18" in capsys.readouterr().out
    assert [path.suffix for path in written.path.parent.iterdir()] == [".json"]


def test_again(tmp_path: Path, engine: KnownEngine, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory(tmp_path / "run")
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["--load", tmp_path / "run", "--data", tmp_path / "a.txt", "--stride", 16]
    run(perplexity, *arguments, "--json")
    first = json.loads(capsys.readouterr().out)
    asked = engine.asked
    assert (
        list(first["scores"]) == ["loss@48", "perplexity@48", "bits_per_byte@48"]
        and asked == first["scores"]["loss@48"]["n"]
    )
    run(perplexity, *arguments, "-o", tmp_path / "loss.pdf")
    assert "was there already" in capsys.readouterr().out and engine.asked == asked
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")
    run(perplexity, *arguments, "--again")
    assert engine.asked == 2 * asked and len(reports(tmp_path / "run" / "evaluation")) == 1
    for other in (["--max-tokens", 60], ["--documents", 1], ["--window", 40], ["--whole-windows"]):
        run(perplexity, *arguments, *other)
    (tmp_path / "a.txt").write_text(TEXT.replace("hat", "Hat"))
    run(perplexity, *arguments)
    assert len(reports(tmp_path / "run" / "evaluation")) == 6


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL after 0, 3, 0 and 11 more windows, and each time a torn line: the report is that of a run without, and
    nothing is computed twice but what was under way."""
    run_directory(tmp_path / "run")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(12)))
    options = ["--load", str(tmp_path / "run"), "--data", str(tmp_path / "a.jsonl"), "--window", "16", "--stride", "8"]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.killed", "0 3 0 11", *options, "--output", str(tmp_path / "resumed")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    asked = json.loads(finished.stdout.splitlines()[-1])
    assert not list((tmp_path / "resumed").glob("*.jsonl"))

    whole = KnownEngine(killed.loss, byte_tokenizer())
    monkeypatch.setattr("archscale_megatron.evaluation.options.open_engine", lambda args: whole)
    run(perplexity, *options, "--output", tmp_path / "whole")
    (resumed,), (uninterrupted,) = reports(tmp_path / "resumed"), reports(tmp_path / "whole")
    assert dataclasses.replace(resumed, path=Path(), time="") == dataclasses.replace(
        uninterrupted, path=Path(), time=""
    )
    assert asked["kills"] == 4
    assert 14 * 8 <= whole.asked - asked["last"] <= 14 * 15  # 14 windows were there


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--stride", 48, "--window", 48], "--stride 48: must be from 1 to 47"),
        (["--stride", 48], "--stride 48: must be from 1 to 47"),
        (["--stride", 0], "--stride 0: must be from 1 to 47"),
        (["--windows", "9,1"], "--window 1: must be 2 or more"),
        (["--window", 64, "--max-length", 48], "--max-length 48: less than a window of 64; leave it out"),
        (["--max-tokens", 0], "--max-tokens 0: must be 1 or more"),
        (["--documents", 0], "--documents 0: must be 1 or more"),
        (["-o", "loss.doc"], "cannot write .doc"),
        (["--data", "nothing.txt"], "nothing.txt: no such file"),
        (["--max-tokens", 1], "nothing to score"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, engine: KnownEngine, arguments: list[Any], problem: str) -> None:
    run_directory(tmp_path / "run")
    (tmp_path / "a.txt").write_text(TEXT)
    common = ["--load", tmp_path / "run", "--data", tmp_path / "a.txt"] + ["--stride", 8] * (
        "--stride" not in arguments
    )
    with pytest.raises(ValueError, match=problem) as raised:
        run(perplexity, *common, *arguments)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("run/evaluation/*.json"))
