"""The command `reason`, with an engine that says what the test wants: scores, resuming, grading again, errors."""

import collections
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from archscale_megatron.checkpoint import agreement
from archscale_megatron.command_line import run_commands
from archscale_megatron.evaluation import reason, reason_report
from archscale_megatron.evaluation.__main__ import main
from archscale_megatron.evaluation.engine import Generated, Sampling
from archscale_megatron.evaluation.grading import Grade, Grader
from archscale_megatron.evaluation.journal import Journal
from tests.evaluation.runs import write_run, write_tokenizer
from tests.evaluation.test_reason_data import GPQA, Tokenizer, written
from tests.evaluation.test_report import run_directory

RIGHT = {"What is half?": "0.5", "What is two?": "2", "What is three?": "3", "What is four?": "4"}
DATA = [
    {"problem": problem, "answer": answer, "level": 1 + i // 2, "subject": "Numbers"}
    for i, (problem, answer) in enumerate(RIGHT.items())
]
# Of each question four samples: equal answers differ in form; one has no answer, two do not end.
SCRIPT = {
    "What is half?": [r"\boxed{\frac12}", r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{5}"],
    "What is two?": [r"\boxed{2}", r"\boxed{3}", r"\boxed{\sqrt 9}", r"\boxed{2.0}"],
    "What is three?": [r"\boxed{4}", r"\boxed{8/2}", r"\boxed{3}", "..."],
    "What is four?": [r"\boxed{1}", r"\boxed{2}", r"\boxed{3}", "..."],
}
VALUES = [["h", "h", "h", "5"], ["2", "3", "3", "2"], ["4", "4", "3", None], ["1", "2", "3", None]]
RIGHT_VALUES = ["h", "2", "3", "4"]


class Fake:
    """An engine whose sample i of a question is SCRIPT's; it breaks down behind so many texts."""

    rank, world_size = 0, 1
    end = (0,)
    source = {"path": "run", "fingerprint": "12", "architecture": "fake_d1"}

    def __init__(self, max_length: int = 100_000, breaks_after: int = -1) -> None:
        self.tokenizer, self.max_length, self.breaks_after = Tokenizer(), max_length, breaks_after
        self.asked: list[int] = []
        self.prompts: list[str] = []
        self.sampling: Sampling | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generated]]:
        assert numbers is not None and len(numbers) == len(prompts)
        self.sampling = sampling
        # An engine orders as it likes.
        for at in sorted(range(len(prompts)), key=lambda at: -numbers[at]):
            if self.breaks_after == 0:
                raise KeyboardInterrupt
            self.breaks_after -= 1
            prompt = "".join(map(chr, prompts[at]))
            text = next(said for question, said in SCRIPT.items() if question in prompt)[numbers[at] % 2**20]
            self.asked.append(numbers[at])
            self.prompts.append(prompt)
            yield at, Generated([5] * len(text), text, text != "...")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With a run directory and data."""
    run_directory(tmp_path / "run")
    written(tmp_path / "data.jsonl", *DATA)
    return tmp_path


def command(place: Path, *options: str, task: str = "math_500", samples: int = 4) -> list[str]:
    return [
        "reason", "--load", str(place / "run"), "--task", task, "--data", str(place / "data.jsonl"),
        "--samples", str(samples), *options,
    ]  # fmt: skip


def reported(monkeypatch: pytest.MonkeyPatch, engine: Any, arguments: list[str]) -> tuple[dict[str, Any], Path]:
    """The report that the command writes, and its path."""
    monkeypatch.setattr(reason, "open_engine", lambda args: engine)
    assert run_commands("evaluation", "", [reason], arguments) == 0
    folder = Path(arguments[2]) / "evaluation"
    path = max(folder.glob("reason-*.json"), key=lambda one: one.stat().st_mtime_ns)
    return json.loads(path.read_text()), path


def test_scores_by_loops(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Fake()
    found, path = reported(monkeypatch, engine, command(place))
    right = [[value == ours for value in own] for own, ours in zip(VALUES, RIGHT_VALUES, strict=True)]
    for k, name in ((1, "math_500"), (2, "math_500/pass@2"), (4, "math_500/pass@4")):
        shares = [statistics.mean(any(one) for one in itertools.combinations(own, k)) for own in right]
        score = found["scores"][name]
        assert score["value"] == pytest.approx(statistics.mean(shares)) and score["metric"] == f"pass@{k}"
        assert score["stderr"] == pytest.approx(statistics.stdev(shares) / 2) and score["n"] == 4
        low, high = found["details"]["intervals"][name]
        assert 0 <= low < score["value"] < high <= 1
    assert set(found["scores"]) == {
        "math_500", *(f"math_500/{name}" for name in ("pass@2", "pass@4", "maj@4", "tokens", "cut_off")),
    }  # fmt: skip
    assert found["scores"]["math_500/maj@4"]["value"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    lengths = [[len(text) for text in SCRIPT[question]] for question in RIGHT]
    assert found["scores"]["math_500/tokens"]["value"] == pytest.approx(statistics.mean(map(statistics.mean, lengths)))
    assert found["scores"]["math_500/cut_off"]["value"] == pytest.approx(2 / 16)
    assert not found["scores"]["math_500/cut_off"]["higher_is_better"]
    details = found["details"]
    levels = details["groups"]["level"]
    assert levels["1"]["pass@1"] == pytest.approx(5 / 8) and levels["2"]["pass@1"] == pytest.approx(1 / 8)
    assert details["groups"]["subject"]["Numbers"]["n"] == 4
    assert details["without_answer"] == pytest.approx(2 / 16)
    assert [one["correct"] for one in details["questions"]] == [3, 2, 1, 0]
    assert details["unreadable"] == [] and details["grading_failed"] == 0
    printed = capsys.readouterr().out
    assert "math_500/maj@4" in printed and "level" in printed and "95 % interval" in printed and str(path) in printed
    # What was asked for.
    assert engine.sampling == Sampling(32768, 0.6, 0.95, 0, (), 0)
    assert engine.prompts[0].startswith(
        "\x01Please reason step by step, and put your final answer within \\boxed{}. What"
    )
    assert sorted(engine.asked) == [q * 2**20 + i for q in range(4) for i in range(4)]
    # What is kept.
    header, *lines = map(json.loads, path.with_suffix(".responses.jsonl").read_text().splitlines())
    assert header["checkpoint"] == Fake.source and header["options"]["task"] == "math_500"
    assert [(line["question"], line["sample"]) for line in lines] == list(itertools.product(range(4), repeat=2))
    assert [line["text"] for line in lines] == [text for own in SCRIPT.values() for text in own]
    assert [line["correct"] for line in lines] == [one for own in right for one in own]
    assert {path.name for path in path.parent.iterdir()} == {path.name, path.with_suffix(".responses.jsonl").name}


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "time"}


def test_a_killed_run_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = reported(monkeypatch, Fake(), command(place))
    responses = path.with_suffix(".responses.jsonl").read_text()
    for first in (0, 7):
        path.unlink()
        killed, rest = Fake(breaks_after=first), Fake()
        with pytest.raises(KeyboardInterrupt):
            reported(monkeypatch, killed, command(place))
        assert not path.exists() and path.with_suffix(".jsonl").exists()
        again, same = reported(monkeypatch, rest, command(place))
        assert same == path and without_time(again) == without_time(whole)
        assert path.with_suffix(".responses.jsonl").read_text() == responses
        asked = killed.asked + rest.asked
        assert len(killed.asked) == first and len(rest.asked) == 16 - first and len(set(asked)) == 16
        assert not path.with_suffix(".jsonl").exists()


def test_a_report_that_is_there_is_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported(monkeypatch, Fake(), command(place))
    engine = Fake()
    _, path = reported(monkeypatch, engine, command(place))
    assert not engine.asked and "was there already" in capsys.readouterr().out
    reported(monkeypatch, engine, command(place, "--again", "--json"))
    assert len(engine.asked) == 16 and json.loads(capsys.readouterr().out)["kind"] == "reason"
    # Other options are another report.
    assert reported(monkeypatch, Fake(), command(place, "--seed", "1"))[1] != path


def test_grading_again(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole, path = reported(monkeypatch, Fake(), command(place))
    kept = path.with_suffix(".responses.jsonl")
    again, same = reported(monkeypatch, None, command(place, "--regrade"))  # without an engine
    assert same == path and without_time(again) == without_time(whole)
    kept.write_text(kept.read_text().replace(r"\\boxed{5}", r"\\boxed{2/4}"))
    again, _ = reported(monkeypatch, None, command(place, "--regrade"))
    assert again["details"]["questions"][0]["correct"] == 4
    assert json.loads(kept.read_text().splitlines()[4])["correct"]
    capsys.readouterr()
    for text, problem in (
        ("{}\n", "is damaged"),
        (kept.read_text().rpartition("\n{")[0] + "\n", "samples are missing"),
    ):
        kept.write_text(text)
        assert problem in refused(capsys, command(place, "--regrade"))
    kept.unlink()
    assert "--regrade: there is no " in refused(capsys, command(place, "--regrade"))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which the command is refused."""
    with pytest.raises(SystemExit) as caught:
        run_commands("evaluation", "", [reason], arguments)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
    assert len(lines) == 1 and lines[0].startswith("evaluation: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--samples", "0"], "--samples 0: must be from 1"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (["--temperature", "0"], "--samples 4: at --temperature 0 all are the same; give --samples 1"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--top-k", "-1"], "--top-k -1: must be 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--task", "aime24"], "data.jsonl:1: field \"answer\" is '0.5'; answers of AIME are integers"),
        (["--task", "gsm8k"], 'data.jsonl:1: no field "question"; there are problem, answer'),
        (["--prompt-template", "nowhere"], "--prompt-template nowhere: cannot be read"),
        (["--chat-template", "on"], "--chat-template on: this model's tokenizer has no chat template"),
        (["--load", "nowhere"], "nowhere"),
    ],
)
def test_errors(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    monkeypatch.setattr(reason, "open_engine", lambda args: Fake())
    assert problem in refused(capsys, command(place, *options))


def test_room_for_an_answer(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    template = written(place / "template", "{problem}")
    longest = max(len(f"\x01{problem}\n") for problem in RIGHT)
    options = ("--prompt-template", str(template), "--stop", "Q:", "--top-k", "7", "--seed", "3")
    engine = Fake(max_length=longest + 9)
    reported(monkeypatch, engine, command(place, *options))
    assert engine.sampling == Sampling(9, 0.6, 0.95, 7, ("Q:",), 3)
    assert "note: answers end after 9 tokens" in capsys.readouterr().err
    assert engine.prompts[0] == "\x01What is four?\n"
    reported(monkeypatch, engine, command(place, *options, "--max-new-tokens", "8"))
    assert engine.sampling.max_new_tokens == 8 and not capsys.readouterr().err
    monkeypatch.setattr(reason, "open_engine", lambda args: Fake(max_length=longest))
    line = refused(capsys, command(place, *options, "--again"))
    assert f"question 3 has {longest} tokens, of {longest} that a sequence may have" in line


def test_letters_and_answers_that_cannot_be_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from archscale_megatron.evaluation.reason_data import read_questions

    path = written(place / "data.jsonl", GPQA)
    right = read_questions(path, "gpqa")[0].answer
    wrong = next(one for one in "ABCD" if one != right)
    monkeypatch.setitem(SCRIPT, "What is it?", [f"Answer: {right}", f"Answer: {wrong}"])
    found, _ = reported(monkeypatch, Fake(), command(place, task="gpqa", samples=2))
    assert found["scores"]["gpqa"]["value"] == 0.5 and found["scores"]["gpqa"]["stderr"] is None
    assert found["scores"]["gpqa/maj@2"]["value"] == 0.5  # a tie
    assert found["details"]["groups"]["domain"]["Physics"] == {"pass@1": 0.5, "stderr": None, "n": 1}
    written(place / "data.jsonl", {"problem": "What is half?", "answer": r"\frac{1}{"}, DATA[1])
    capsys.readouterr()
    found, _ = reported(monkeypatch, Fake(), command(place, "--temperature", "0", task="math", samples=1))
    assert found["details"]["unreadable"] == [0] and "math/maj@1" not in found["scores"]
    assert "does not find equal to themselves: questions 1\n" in capsys.readouterr().out + "\n"


def test_majority_by_enumeration() -> None:
    """Of up to four samples: the right answer, two wrong ones, of which one also in another form, or none."""

    class Same:
        def equal(self, a: Grade, b: Grade) -> bool:
            assert not a.correct and not b.correct
            return str(a.answer)[0] == str(b.answer)[0]

    kinds = {"r": Grade("r", True), "x": Grade("x", False), "x2": Grade("x2", False), "y": Grade("y", False)}
    kinds |= {"": Grade(None, False), "failed": Grade("z", False, failed=True)}
    for length in range(1, 5):
        for names in itertools.product(kinds, repeat=length):
            votes = collections.Counter(name[0] for name in names if name not in ("", "failed"))
            top = [one for one, count in votes.items() if count == max(votes.values())]
            expected = top.count("r") / len(top) if top else 0.0
            assert reason_report.majority_is_right([kinds[name] for name in names], Same()) == pytest.approx(expected)


def test_right_answers_are_one_group() -> None:
    """By way of the answer in the data, even where math-verify would not find them equal to one another."""
    with Grader() as grader:
        grades = [grader.grade(rf"\boxed{{{text}}}", "x>2", "math") for text in ("x>2", r"(2,\infty)", "5", "6")]
        assert [one.correct for one in grades] == [True, True, False, False]
        assert reason_report.majority_is_right(grades, grader) == 1.0


def test_ranks_divide_the_samples(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 1 made comes to rank 0, a round at a time."""
    monkeypatch.setattr(reason, "ROUND", 3)
    sent: list[list[Any]] = []

    class Kept:
        def __init__(self) -> None:
            self.done: dict[str, Any] = {"1:1": {}}

        def append(self, key: str, record: Any) -> None:
            assert key not in self.done
            self.done[key] = record

    def journal_of(rank: int, gather: Any) -> dict[str, Any]:
        engine, journal = Fake(), Kept()
        engine.rank, engine.world_size = rank, 2
        monkeypatch.setattr(agreement, "of_all_ranks", gather)
        parser_args = command(place)
        args = arguments(parser_args)
        questions = reason.read_questions(args.data, args.task)
        reason.generate(engine, questions, "{problem}", args, journal)
        return journal.done

    journal_of(1, lambda records: sent.append(records) or [records])
    assert [len(records) for records in sent] == [3, 3, 1]
    rounds = iter(sent)
    done = journal_of(0, lambda records: [records, next(rounds), records])  # a tensor-parallel rank has the same
    assert set(done) == {f"{q}:{i}" for q in range(4) for i in range(4)}
    texts = list(SCRIPT.values())
    assert all(record["text"] == texts[int(key[0])][int(key[2])] for key, record in done.items() if record)


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A small one, of which a run that is killed and taken up again makes the same texts, each sample another."""
    run = write_run(tmp_path / "run", "sambay", write_tokenizer(tmp_path / "tokenizer"))
    written(tmp_path / "data.jsonl", *({"problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(3)))
    template = written(tmp_path / "template", "{problem}")
    words = command(tmp_path, "--prompt-template", str(template), "--max-new-tokens", "12", task="math", samples=3)
    append, left = Journal.append, 5

    def dying(self: Journal, key: str, record: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        append(self, key, record)

    def texts(words: list[str]) -> list[str]:
        assert main(words) == 0
        (kept,) = (run / "evaluation").glob("*.responses.jsonl")
        return [json.loads(line)["text"] for line in kept.read_text().splitlines()[1:]]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", dying)
        main(words)
    resumed = texts(words)
    assert texts([*words, "--again", "--batch-size", "1"]) == resumed and len(set(resumed)) == 9
    assert "math/cut_off" in capsys.readouterr().out
    assert texts([*words, "--regrade"]) == resumed


def arguments(words: list[str]) -> Any:
    from archscale_megatron.command_line import Parser

    parser = Parser()
    reason.add_commands(parser.add_subparsers())
    return parser.parse_args(words)
