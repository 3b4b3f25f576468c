"""lm-eval with our model beside its own `hf` on the export: every number of every item, on tasks made here."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from archscale_megatron.evaluation.__main__ import main
from archscale_megatron.hf.export import export
from tests.evaluation import ruler
from tests.evaluation.runs import write_run, write_tokenizer
from tests.launch import ROOT, torchrun

FAMILIES = ("transformer", "sambay")
WORDS = ("import", "return", "class", "yield", "lambda", "global", "assert", "except", "raise", "while", "break", "for")
SOURCE = Path(os.__file__).read_text().split("\n\n")


def items() -> dict[str, list[dict[str, Any]]]:
    """Data of each task: longer than the models' context, shorter, empty, and with a bos token of its own."""
    texts = [text for text in SOURCE if 40 < len(text) < 900][:40]
    choice = [
        {"question": text[: 30 + 15 * i], "choices": [WORDS[i % 12], "x", WORDS[(i + 5) % 12] + " 1", "the end"],
         "answer": i % 4}
        for i, text in enumerate(["<|start|>" + texts[13], *texts[:13]])
    ]  # fmt: skip
    last = [{"text": " ".join(text.split())} for text in texts[14:26] if len(text.split()) > 2]
    rolling = [{"page": text} for text in ["", "x", "\n\n".join(texts[:5]), *texts[26:32]]]
    until = [{"prompt": text, "answer": "x"} for text in ["\n\n".join(texts[5:9]), "<|start|>x", *texts[32:38]]]
    return {"choice": choice, "last": last, "rolling": rolling, "until": until}


CONFIGS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}", "fewshot_split": "test",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                        for name in ("acc", "acc_norm")],
    },
    "last": {
        "output_type": "loglikelihood", "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                        {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "until": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "s"], "max_gen_toks": 14},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


def write_tasks(directory: Path) -> Path:
    """A folder for --include-path."""
    directory.mkdir()
    for name, rows in items().items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "num_fewshot": None, "metadata": {"version": 1.0}, **CONFIGS[name],
        }  # fmt: skip
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return directory


TASKS = ",".join(f"local_{name}" for name in CONFIGS)


@pytest.fixture(scope="module", autouse=True)
def one_manager_of_all_tasks() -> Iterator[None]:
    """lm-eval takes seconds to read its own tasks; once is enough."""
    from lm_eval import tasks

    made, kept = tasks.TaskManager, functools.cache(tasks.TaskManager)

    def manager(*, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        return made(metadata=metadata, **options) if metadata else kept(**options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", manager)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tasks/, and for each family a run directory NAME and its export NAME.hf; and one whose tokenizer adds a bos."""
    root = tmp_path_factory.mktemp("lm_eval")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's `hf` is not to fork this process and its threads
    write_tasks(root / "tasks")
    tokenizer = write_tokenizer(root / "tokenizer")
    for family in FAMILIES:
        export(write_run(root / family, family, tokenizer), root / f"{family}.hf")
    bos = _with_bos(root / "tokenizer", root / "bos")
    export(write_run(root / "sambay_bos", "sambay", bos), root / "sambay_bos.hf")
    return root


def _with_bos(tokenizer: Path, directory: Path) -> str:
    """A tokenizer that puts <|start|> before each text."""
    from tokenizers import Tokenizer, processors

    shutil.copytree(tokenizer, directory)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    start = ("<|start|>", backend.token_to_id("<|start|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    backend.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|start|>"}))
    return str(directory)


def lm_eval(root: Path, model: str, arguments: dict[str, Any], tasks: str = TASKS, **options: Any) -> dict[str, Any]:
    """lm-eval's results with all samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model, model_args=arguments, tasks=tasks.split(","), task_manager=manager, bootstrap_iters=100, **options
    )
    assert found is not None
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every score, and every number and text of every item."""
    assert ours["results"].keys() == theirs["results"].keys()
    for task, expected in theirs["results"].items():
        assert _numbers(ours["results"][task]) == pytest.approx(_numbers(expected), rel=2e-5), task
    for task, samples in theirs["samples"].items():
        assert len(samples) == len(ours["samples"][task]) > 5
        for one, other in zip(ours["samples"][task], samples, strict=True):
            assert one["arguments"] == other["arguments"]
            for got, expected in zip(_flat(one["resps"]), _flat(other["resps"]), strict=True):
                assert got == (pytest.approx(expected, abs=2e-4) if isinstance(expected, float) else expected), task


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def _flat(value: Any) -> list[Any]:
    return [part for one in value for part in _flat(one)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", [*FAMILIES, "sambay_bos"])
def test_every_number_is_that_of_hf_on_the_export(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "LOCAL_RANK"):  # accelerate takes them for torchrun's
        monkeypatch.delenv(variable, raising=False)
    options = {"num_fewshot": 2} if name == "sambay" else {}
    their_arguments = {"pretrained": str(root / f"{name}.hf"), "trust_remote_code": True, "device": "cpu"}
    theirs = lm_eval(root, "hf", their_arguments, batch_size=1, **options)
    assert theirs["samples"]["local_last"]
    from archscale_megatron.evaluation import lm_eval_model  # noqa: F401  registers it

    for load, batch_size in ((root / name, 1), (root / f"{name}.hf", 16)):
        assert_same(lm_eval(root, "archscale", {"load": str(load)}, batch_size=batch_size, **options), theirs)
    texts = [sample["resps"][0][0] for sample in theirs["samples"]["local_until"]]
    assert any(texts) and len(set(texts)) > 3


def report_of(root: Path, output: Path, *arguments: str, load: str = "sambay") -> dict[str, Any]:
    common = ["--load", str(root / load), "--include-path", str(root / "tasks"), "--output", str(output)]
    assert main(["lm-eval", *common, "--tasks", TASKS, *arguments]) == 0
    (path,) = output.glob("*.json")
    return json.loads(path.read_text())


def values(report: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in report["scores"].items()}


def test_command(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report, made without a fork; what is there is shown; an export has the same, and two ranks."""
    monkeypatch.delenv("DISABLE_MULTIPROC")
    monkeypatch.setattr(multiprocessing, "Pool", None)
    whole = report_of(root, tmp_path / "whole")
    scores = values(whole)
    assert scores.keys() >= {
        "local_choice/acc",
        "local_choice/acc_norm",
        "local_last/perplexity",
        "local_until/exact_match",
    }
    assert whole["scores"]["local_choice/acc"]["n"] == 14 and whole["scores"]["local_choice/acc"]["stderr"] > 0
    assert not whole["scores"]["local_last/perplexity"]["higher_is_better"]
    assert whole["checkpoint"]["architecture"] == "sambay_d8" and whole["kind"] == "lm-eval"
    assert "local_choice/acc" in capsys.readouterr().out
    report_of(root, tmp_path / "whole")
    assert "was there already" in capsys.readouterr().out

    exported = report_of(root, tmp_path / "export", load="sambay.hf")
    two = tmp_path / "two"
    torchrun(2, "-m", "archscale_megatron.evaluation", "lm-eval", "--load", str(root / "sambay"), "--include-path",
             str(root / "tasks"), "--output", str(two), "--tasks", TASKS, timeout=300)  # fmt: skip
    (path,) = two.glob("*.json")
    for other in (exported, json.loads(path.read_text())):
        assert values(other) == pytest.approx(scores, rel=1e-5)


def test_a_killed_evaluation_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archscale_megatron.evaluation.transformers_engine import TransformersEngine

    expected = report_of(root, tmp_path / "whole")
    score = TransformersEngine.score
    computed: list[int] = []

    def counted(self: Any, sequences: Any, first: Any) -> Any:
        for one in score(self, sequences, first):
            if len(computed) == 30 and not kept:
                raise KeyboardInterrupt
            computed.append(1)
            yield one

    monkeypatch.setattr(TransformersEngine, "score", counted)
    kept: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        report_of(root, tmp_path / "killed")
    (journal,) = (tmp_path / "killed").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 31
    kept.append(True)
    found = report_of(root, tmp_path / "killed")
    assert values(found) == pytest.approx(values(expected), rel=1e-5)
    assert not journal.exists()
    once = len(computed)
    report_of(root, tmp_path / "killed", "--again")
    assert len(computed) == 2 * once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "wikitext"], "--tasks wikitext: its dataset is not on this disk (Couldn't reach 'EleutherAI/"),
        (["--tasks", "no_such"], "--tasks no_such: lm-eval has no such task"),
        (["--tasks", "niah_single_1"], "`evaluation needles` needs neither"),
        (["--tasks", "local_until", "--max-length", "14"], "max_gen_toks 14 leaves no room in 14 tokens"),
        (["--tasks", "local_choice", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--tasks", "local_choice", "--apply-chat-template"], "the tokenizer has no chat template"),
        (["--tasks", "local_choice", "--limit", "1", "--samples", "{}"], "--limit and --samples: give one of them"),
    ],
)
def test_bad_input_is_one_line(
    root: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--load", str(root / "sambay"), "--include-path", str(root / "tasks"), "--output", str(tmp_path)]
    with ruler.missing(), pytest.raises(SystemExit) as stopped:
        main(["lm-eval", *common, *arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("evaluation: error: ") and message in line


def test_ruler(root: Path, tmp_path: Path) -> None:
    """Its own tasks, with the model's tokenizer, of a run directory and of an export; each time the same items."""
    options = ["--tasks", "niah_single_1", "--max-length", "330", "--limit", "3", "--log-samples", "--metadata"]
    random.seed()
    with ruler.installed([]):
        for load in ("sambay", "sambay.hf"):
            common = ["--load", str(root / load), "--output", str(tmp_path / load)]
            assert main(["lm-eval", *common, *options, '{"max_seq_lengths": [300]}']) == 0
    reports = [json.loads(next(path.glob("*.json")).read_text()) for path in sorted(tmp_path.iterdir())]
    (one, other) = [report["details"]["samples"]["niah_single_1"] for report in reports]
    assert len(one) == 3 and [item["doc"] for item in one] == [item["doc"] for item in other]
    assert list(reports[0]["scores"]) == ["niah_single_1/300"] and reports[0]["scores"]["niah_single_1/300"]["n"] == 3


def test_copies_of_datasets(root: Path, tmp_path: Path) -> None:
    """A dataset's repository in a folder is found under its name on the Hub."""
    folder = tmp_path / "copies/owner/data"
    folder.mkdir(parents=True)
    shutil.copy(root / "tasks/choice.jsonl", folder / "test.jsonl")
    (tmp_path / "tasks").mkdir()
    config = yaml.safe_load((root / "tasks/choice.yaml").read_text()) | {"dataset_path": "owner/data"}
    del config["dataset_kwargs"]
    (tmp_path / "tasks/choice.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "output"
    options = ["--include-path", str(tmp_path / "tasks"), "--datasets", str(tmp_path / "copies"), "--limit", "3"]
    assert (
        main(["lm-eval", "--load", str(root / "sambay"), "--tasks", "local_choice", "--output", str(output), *options])
        == 0
    )
    (path,) = output.glob("*.json")
    assert json.loads(path.read_text())["scores"]["local_choice/acc"]["n"] == 3


def test_lm_eval_finds_the_model_by_its_name(root: Path, tmp_path: Path) -> None:
    """The program `lm_eval`, as installed, and its cache of answers."""
    from sqlitedict import SqliteDict

    arguments = f"load={root / 'transformer'},max_length=64"
    command = [
        str(Path(sys.executable).with_name("lm_eval")), "--model", "archscale", "--model_args", arguments, "--tasks",
        "local_choice", "--include_path", str(root / "tasks"), "--use_cache", str(tmp_path / "cache"), "--output_path",
        str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "|local_choice|" in finished.stdout.replace(" ", "")
    with SqliteDict(str(tmp_path / "cache_rank0.db")) as cached:  # of which the next would take all
        assert len(cached) == 4 * len(items()["choice"])
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert math.isfinite(results["results"]["local_choice"]["acc,none"])
