"""Reports: what is written is read, where it goes, what a fingerprint sees."""

import argparse
import json
import math
from pathlib import Path

import pytest

from archscale_megatron.checkpoint import CheckpointError, manifest
from archscale_megatron.evaluation import report
from archscale_megatron.evaluation.report import Score

SCORES = {"arc_easy/acc": Score(0.5, 0.1, 25, "acc"), "text": Score(math.nan, None, 3, "perplexity", False)}


def run_directory(path: Path, iteration: int = 4, weights: bytes = b"weights") -> Path:
    """With one checkpoint, of which `weights` are all."""
    checkpoint = path / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(weights)
    manifest.write(checkpoint, {})
    (path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def export_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"vocab_size": 5}')
    (path / "model.safetensors").write_bytes(bytes(3 << 20))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    written = report.write(
        path, kind="lm-eval", scores=SCORES, options={"limit": None, "data": Path("a/b"), "shots": (1, 2)},
        source={"path": "run", "fingerprint": "12"}, details={"loss": [1.5, math.inf]},
    )  # fmt: skip
    assert written.scores["arc_easy/acc"] == SCORES["arc_easy/acc"]
    assert math.isnan(written.scores["text"].value)
    assert written.options == {"limit": None, "data": "a/b", "shots": [1, 2]}
    assert written.details == {"loss": [1.5, None]}
    assert {"python", "torch", "transformers", "megatron-core", "archscale-megatron"} <= written.versions.keys()
    assert written.time.endswith("+00:00")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    shown = report.table(written).splitlines()
    assert shown[1].split() == ["arc_easy/acc", "acc", "0.5000", "±", "0.1000", "25"]
    assert shown[2].split() == ["text", "perplexity", "nan", "3"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{", "not JSON"), ("[1]", "not a report"), ('{"format": 1}', "not a report"),
        ('{"format": 2, "kind": "a", "scores": {}}', "a report of format 2; this release reads 1"),
        ('{"format": 1, "kind": "a", "scores": {}}', "a damaged report"),
        ('{"format": 1, "kind": "a", "scores": {"b": {"value": "x"}}}', "a damaged report"),
        ('{"format": 1, "kind": "a", "scores": 3}', "a damaged report"),
        ("\udcff", "not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=problem) as raised:
        report.read(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_where_a_report_goes(tmp_path: Path) -> None:
    run, folder = run_directory(tmp_path / "run"), export_folder(tmp_path / "export")
    of_run = report.output_path(None, run, "lm-eval", {"limit": 3})
    assert of_run.parent == run / "evaluation" and of_run.name.startswith("lm-eval-iter_0000004-")
    assert report.output_path(None, run / "iter_0000004", "lm-eval", {"limit": 3}) == of_run
    of_folder = report.output_path(None, folder, "needles", {})
    assert of_folder.parent == folder / "evaluation" and of_folder.name.startswith("needles-export-")
    elsewhere = report.output_path(tmp_path / "here", run, "lm-eval", {"limit": 3})
    assert elsewhere == tmp_path / "here" / of_run.name
    assert report.output_path(None, run, "lm-eval", {"limit": 4}) != of_run
    with pytest.raises(CheckpointError, match="no such directory"):
        report.output_path(None, tmp_path / "nothing", "lm-eval", {})


def test_the_name_is_of_the_weights(tmp_path: Path) -> None:
    """A run that was trained anew under the same name has other reports."""
    first = run_directory(tmp_path / "a" / "run")
    other = run_directory(tmp_path / "b" / "run", weights=b"WEIGHTS")
    names = [report.output_path(None, run, "reason", {}).name for run in (first, other)]
    assert names[0] != names[1] and names[0].rpartition("-")[0] == names[1].rpartition("-")[0]


@pytest.mark.parametrize("position", [0, (3 << 20) - 1])
def test_fingerprint_of_an_export(tmp_path: Path, position: int) -> None:
    folder = export_folder(tmp_path / "export")
    before = report.fingerprint(folder)
    (folder / "README.md").write_text("notes")
    (folder / "evaluation").mkdir()
    assert report.fingerprint(folder) == before
    weights = bytearray(3 << 20)
    weights[position] = 1
    (folder / "model.safetensors").write_bytes(weights)
    changed = report.fingerprint(folder)
    (folder / "config.json").write_text('{"vocab_size": 6}')
    assert len({before, changed, report.fingerprint(folder)}) == 3


def test_a_report_that_is_there_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    report.add_output_option(parser)
    path = tmp_path / "a.json"
    assert not report.shown_if_there(path, parser.parse_args([]))
    report.write(path, kind="reason", scores=SCORES, options={}, source={})
    assert not report.shown_if_there(path, parser.parse_args(["--again"]))
    assert capsys.readouterr().out == ""
    assert report.shown_if_there(path, parser.parse_args([]))
    assert "arc_easy/acc" in (out := capsys.readouterr().out) and "--again computes it anew" in out
    assert report.shown_if_there(path, parser.parse_args(["--json"]))
    assert json.loads(capsys.readouterr().out)["kind"] == "reason"
