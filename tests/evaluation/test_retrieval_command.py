"""The commands `needles`, `phonebook` and `plot`: reports, tables, pictures, one line for bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from archscale_megatron.command_line import run_commands
from archscale_megatron.evaluation import needles_command, phonebook_command, report, retrieval_command, retrieval_plot
from tests.evaluation.answering import Random, Texts, oracle

PROGRAM = (needles_command, phonebook_command, retrieval_plot)
SMALL = ["--samples", "3", "--load", "LOAD"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What reports take for an export, a text, and room for reports."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("An essay. It says more. " * 20)
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, bpe: Any) -> list[Texts]:
    """The engines that were opened; the next is the oracle with a trained context of 2,048 tokens."""
    engines: list[Texts] = []

    def open_engine(args: Any) -> Texts:
        engines.append(Texts(bpe, oracle, args.max_length or 2048))
        return engines[-1]

    monkeypatch.setattr(retrieval_command, "open_engine", open_engine)
    return engines


def call(folder: Path, *arguments: str) -> int:
    """Run the program; LOAD and TEXT stand for paths."""
    paths = {"LOAD": "model", "TEXT": "text.txt", "EMPTY": "empty.txt", "PNG": "out.png"}
    given = [str(folder / paths[each]) if each in paths else each for each in arguments]
    return run_commands("evaluation", "", PROGRAM, given)


def reports(folder: Path) -> list[report.Report]:
    """Those that are there."""
    return [report.read(path) for path in sorted((folder / "model" / "evaluation").glob("*.json"))]


def test_needles(folder: Path, opened: list[Texts], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["needles", *SMALL, "--lengths", "900,1400", "--haystack", "TEXT", "-o", "PNG"]
    assert call(folder, *options) == 0
    (made,) = reports(folder)
    assert len(made.scores) == 16 and all(one.value == 1 and one.n == 3 for one in made.scores.values())
    assert made.scores["niah_multivalue@900"].metric == "string_match_all"
    assert made.options["haystack"]["name"] == "text.txt" and made.options["seeds"] == [0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["needles", "found,", "%", "900", "1,400"]
    assert [line.split() for line in lines[1:9]] == [[task, "100.0", "100.0"] for task in made.options["tasks"]]
    assert lines[9].split() == ["mean", "100.0", "100.0"] and lines[10] == str(made.path)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(made.path.parent.glob("*.jsonl"))

    (folder / "out.png").unlink()
    assert call(folder, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"]["niah_single_1@900"]["value"] == 1
    assert len(opened) == 1 and (folder / "out.png").exists()  # it was there
    assert call(folder, *options) == 0
    assert "is there already; --again" in capsys.readouterr().out
    assert call(folder, *options, "--again") == 0
    assert len(opened) == 2


def test_needles_without_a_text(folder: Path, opened: list[Texts]) -> None:
    assert call(folder, "needles", *SMALL, "--lengths", "900", "--seeds", "5,6") == 0
    (made,) = reports(folder)
    assert list(made.scores) == ["niah_single_1@900", "niah_multikey_2@900", "niah_multikey_3@900"]
    assert made.details["niah_single_1@900"]["seeds"] == {"5": 1, "6": 1}
    assert made.scores["niah_single_1@900"].n == 6


def test_phonebook(folder: Path, opened: list[Texts], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "phonebook", *SMALL, "--lengths", "300,600,1200", "-o", "PNG") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["300", "600", "1200"]
    assert [line.split()[-4:] for line in lines[1:4]] == [["100.0", "±", "0.0", "12"]] * 3
    assert call(folder, "phonebook", *SMALL, "--entries", "10,50") == 0
    by_entries, by_tokens = sorted(reports(folder), key=lambda one: "lengths" in one.options)
    assert list(by_entries.scores) == ["phonebook@10 entries", "phonebook@50 entries"]
    assert [one["units"] for one in by_entries.details.values()] == [10, 50]
    assert list(by_tokens.scores) == ["phonebook@300", "phonebook@600", "phonebook@1200"]
    (folder / "out.png").unlink()
    assert call(folder, "plot", str(by_entries.path), str(by_tokens.path), "-o", "PNG") == 0
    assert (folder / "out.png").exists()


def test_480_entries_without_options(folder: Path, opened: list[Texts]) -> None:
    assert call(folder, "phonebook", "--load", "LOAD", "--max-length", "20000", "--samples", "1") == 0
    (made,) = reports(folder)
    assert made.details["phonebook@480 entries"]["units"] == 480 and made.options["seeds"] == [0, 1, 2, 3]


def test_goes_on_after_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch, bpe: Any) -> None:
    told = []

    def answer(prompt: str) -> str:
        if len(told) == 5:
            raise KeyboardInterrupt
        told.append(prompt)
        return oracle(prompt)

    options = ["phonebook", *SMALL, "--lengths", "300"]
    monkeypatch.setattr(retrieval_command, "open_engine", lambda args: Texts(bpe, answer, 2048))
    with pytest.raises(KeyboardInterrupt):
        call(folder, *options)
    rest = Texts(bpe, oracle, 2048)
    monkeypatch.setattr(retrieval_command, "open_engine", lambda args: rest)
    assert call(folder, *options) == 0 and len(rest.prompts) == 12 - 5
    (made,) = reports(folder)
    assert made.scores["phonebook@300"].value == 1


def test_random_model(folder: Path, monkeypatch: pytest.MonkeyPatch, bpe: Any) -> None:
    monkeypatch.setattr(retrieval_command, "open_engine", lambda args: Random(bpe, 2048))
    assert call(folder, "needles", *SMALL, "--lengths", "900") == 0
    (made,) = reports(folder)
    assert [one.value for one in made.scores.values()] == [0, 0, 0]


@pytest.mark.parametrize(("arguments", "message"), [
    ("needles --samples 0", "argument --samples: 0: give a whole number of 1 or more"),
    ("needles --samples x", "argument --samples: x: give a whole number"),
    ("needles --seeds=-1", "argument --seeds: -1: each must be 0 or more"),
    ("needles --lengths 512,512", "argument --lengths: 512,512: give each number once"),
    ("needles --tasks niah", "--tasks niah: there is no such task; use any of niah_single_1, niah_single_2, niah_sing"),
    ("needles --tasks niah_single_1,niah_single_2", "--tasks niah_single_2: hides its needles in a text; give one with "
     "--haystack FILE, or only tasks that need none: niah_single_1,niah_multikey_2,niah_multikey_3"),
    ("needles --haystack nowhere.txt", "--haystack nowhere.txt: cannot be used"),
    ("needles --haystack EMPTY", "cannot be used (the haystack has no words)"),
    ("needles --lengths 1024,4096",
     "needles of 4096 tokens: the model was trained on 2048; give shorter ones, or --max-length 4096"),
    ("needles --lengths 4096 --max-length 3000", "--max-length is 3000; give shorter ones, or --max-length 4096"),
    ("needles --lengths 200,1024", "niah_single_1 does not fit into 200 tokens with 128 of the answer: its shortest"),
    ("phonebook", "the model was trained on 2048; give shorter ones, or --max-length "),
    ("phonebook --entries 2", "argument --entries: 2: each must be 3 or more"),
    ("phonebook --lengths 50", "a phone book does not fit into 50 tokens: its shortest prompt has "),
    ("phonebook --lengths 500 --entries 20", "not allowed with argument"),
    ("phonebook --lengths 500 -o nowhere/x.png", "-o nowhere/x.png: there is no directory nowhere; make it first"),
])  # fmt: skip
def test_one_line_for_bad_input(
    folder: Path, opened: list[Texts], capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(folder, *arguments.split(), "--load", "LOAD")
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert stopped.value.code == 2 and captured.out == ""
    assert line.startswith("evaluation: error: ") and message in line
    assert not (folder / "model" / "evaluation").exists()


def test_plot_refuses_other_reports(folder: Path, opened: list[Texts], capsys: pytest.CaptureFixture[str]) -> None:
    call(folder, "phonebook", *SMALL, "--lengths", "300")
    call(folder, "needles", *SMALL, "--lengths", "900")
    needles, book = (str(one.path) for one in reports(folder))
    other = report.write(folder / "other.json", kind="reason", scores={}, options={}, source={}).path
    capsys.readouterr()
    for paths, message in (([needles, book], "and the first is of needles"), ([str(other)], "a report of reason")):
        with pytest.raises(SystemExit):
            call(folder, "plot", *paths, "-o", "PNG")
        assert message in capsys.readouterr().err and not (folder / "out.png").exists()
