"""Tables and bars of reports: which scores meet in a row, what is best, what a difference is."""

import json
import math
import re
from pathlib import Path

import pytest

from archscale_megatron.evaluation import compare, report
from archscale_megatron.evaluation.report import Score
from tests.evaluation.commands import run
from tests.evaluation.test_report import run_directory


def make(path: Path, time: str = "2026-01-01T00:00:00+00:00", kind: str = "lm-eval", **fields: object) -> Path:
    """A report; `fields` are `scores` as name -> (value, stderr, metric), and `options`."""
    scores = {
        name: Score(value, stderr, 10, metric, metric != "perplexity")
        for name, (value, stderr, metric) in fields["scores"].items()
    }
    options = fields.get("options", {})
    report.write(path, kind=kind, scores=scores, options=options, source={"path": f"/runs/{path.stem}"})
    path.write_text(re.sub(r'"time": "[^"]*"', f'"time": "{time}"', path.read_text()))
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    first = {"a": (0.5, 0.03, "acc"), "text": (20.0, 0.3, "perplexity"), "b": (0.2, None, "acc")}
    second = {"a": (0.6, 0.04, "acc"), "text": (18.0, 0.4, "perplexity"), "b": (0.3, 0.1, "acc")}
    return [make(tmp_path / "first.json", scores=first), make(tmp_path / "second.json", scores=second)]


def test_differences_and_what_is_best(two: list[Path]) -> None:
    runs = compare.open_runs(two)
    rows = {row.name: row for row in compare.rows_of(runs)}
    assert list(rows) == ["a", "text", "b"]
    assert rows["a"].difference() == pytest.approx((0.1, 0.05)) and not rows["a"].is_beyond()
    assert rows["text"].difference() == pytest.approx((-2.0, 0.5)) and rows["text"].is_beyond()
    assert rows["b"].difference() == (pytest.approx(0.1), None) and not rows["b"].is_beyond()
    assert [row.best() for row in rows.values()] == [[1], [1], [1]]
    shown = compare.table(runs, list(rows.values())).splitlines()
    assert shown[0].split() == ["metric", "first", "second", "difference"]
    assert " ".join(shown[2].split()) == "text perplexity ↓ 20.0000 ± 0.3000 18.0000 ± 0.4000 -2.0000 ± 0.5000 *"
    assert len({line.index("±") for line in shown[1:3]}) == 1
    bold = compare.table(runs, list(rows.values()), bold=True)
    assert re.findall(r"\033\[1m(.*?)\033\[0m", bold) == [" 0.6000 ± 0.0400", "18.0000 ± 0.4000", " 0.3000 ± 0.1000"]
    assert re.sub(r"\033\[\dm", "", bold).splitlines() == shown


def test_one_run_and_three(two: list[Path], tmp_path: Path) -> None:
    third = make(tmp_path / "third.json", scores={"a": (0.6, 0.1, "acc"), "c": (math.nan, None, "acc")})
    rows = {row.name: row for row in compare.rows_of(compare.open_runs([*two, third]))}
    assert rows["a"].best() == [1, 2] and rows["a"].difference() is None
    assert rows["text"].scores[2] is None and rows["c"].best() == []
    run(compare, *two, third, "-o", tmp_path / "bars.svg", "--metric", "perplexity", "acc")
    drawn = (tmp_path / "bars.svg").read_text()
    assert drawn.count("<!-- third -->") == drawn.count("<!-- text -->") == 1
    alone = compare.open_runs(two[:1])
    assert [row.best() for row in compare.rows_of(alone)] == [[], [], []]
    assert "difference" not in compare.table(alone, compare.rows_of(alone)) + "".join(compare.notes_of(alone))


def test_other_options_are_other_rows(tmp_path: Path) -> None:
    data = [{"name": "a.txt", "bytes": 3, "digest": digest} for digest in ("00" * 8, "ff" * 8)]
    paths = [
        make(tmp_path / f"{i}.json", scores={"a": (0.1 * i, 0.1, "acc")}, options=options)
        for i, options in enumerate(
            [
                {"limit": 10, "tasks": ["a", "b"], "dtype": "bf16"}, {"limit": 10, "tasks": ["a"], "dtype": "fp32"},
                {"limit": None}, {"limit": 10, "num_fewshot": 5}, {}, {"data": data[:1]}, {"data": data[1:]},
            ]
        )
    ]  # fmt: skip
    runs = compare.open_runs(paths)
    rows = compare.rows_of(runs)
    together = [[i for i, score in enumerate(row.scores) if score] for row in rows]
    assert sorted(together) == [[0, 1], [2, 4], [3], [5], [6]]
    assert {row.name for row in rows} == {
        "a (data not given, limit 10, num_fewshot not given)",
        "a (data not given, limit 10, num_fewshot 5)",
        "a (data not given, limit not given, num_fewshot not given)",
        "a (data a.txt:000000, limit not given, num_fewshot not given)",
        "a (data a.txt:ffffff, limit not given, num_fewshot not given)",
    }
    assert compare.notes_of(runs)[:2] == ["0: /runs/0, bf16", "1: /runs/1, fp32"]


def test_the_newest_counts(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    names = ("z-iter_0000004-1.json", "y-iter_0000008-2.json", "x-iter_0000008-3.json")
    for month, (name, value) in enumerate(zip(names, (0.3, 0.2, 0.1), strict=True), 1):
        scores = {"a": (value, None, "acc")} | ({"b": (0.7, None, "acc")} if month == 1 else {})
        make(run / "evaluation" / name, f"2026-0{month}-01T00:00:00+00:00", scores=scores)
    assert [row.scores[0].value for row in compare.rows_of(compare.open_runs([run]))] == [0.1, 0.7]
    assert compare.notes_of(compare.open_runs([run])) == [
        "run: /runs/x-iter_0000008-3, /runs/z-iter_0000004-1; 1 older report of the same left out"
    ]
    both = compare.open_runs([run / "iter_0000004", run / "evaluation"])
    assert [run.label for run in both] == ["run/iter_0000004", "run"]
    assert [score.value for score in compare.rows_of(both)[0].scores] == [0.3, 0.1]
    assert [run.label for run in compare.open_runs([run, run])] == [str(run), str(run)]


def test_the_command(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(compare, *two, "-o", tmp_path / "bars.png")
    printed = capsys.readouterr().out
    assert "\033" not in printed and "second: /runs/second" in printed
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    run(compare, *two, "--json", "--metric", "perplexity")
    content = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["beyond_two_stderr"]) for row in content["rows"]] == [("text", True)]
    assert content["rows"][0]["scores"][1]["stderr"] == 0.4
    assert content["runs"][0]["reports"] == [str(two[0])]


def test_bad_input_is_one_line(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    for arguments, problem in (
        ([tmp_path / "nothing"], "nothing: no such file or directory; give a run directory"),
        ([tmp_path / "empty"], r"empty: no reports evaluation/\*.json; make one first"),
        ([export], "export: no reports"),
        ([two[0], tmp_path / "bad.json"], "bad.json: not JSON"),
        ([*two, "--metric", "f1"], "--metric f1: no score has it; there are acc, perplexity"),
        ([*two, "-o", tmp_path / "a.doc"], "cannot write .doc"),
    ):
        with pytest.raises(ValueError, match=problem) as raised:
            run(compare, *arguments)
        assert "\n" not in str(raised.value)
