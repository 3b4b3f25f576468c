"""Tasks that are scored during training: their scores, a training that does not notice, and options that score none."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale_megatron.evaluation.lm_eval_command import load_tasks, scores
from archscale_megatron.training import eval_tasks
from tests.data.models import train_bpe
from tests.launch import torchrun
from tests.training.data import write_dataset
from tests.training.runs import scalars, tensors
from tests.training.tasks import NAMES, write_tasks

STEPS = 6
TAGS = ("small_choices/acc", "small_choices/acc_norm", "small_texts/bits_per_byte", "small_answers/exact_match")
MODEL = "--depth 8 --head-dim 8 --local-window 8 --vocab-size 2000 --hidden-dropout 0.1 --attention-dropout 0.1"
# Sequence parallelism, virtual stages with shared keys, values and memory, and an end that is no interval;
# experts, half precision, and parameters that are gathered while others compute.
RUNS = {
    "tp2 pp2": (4, "--train-model sambay --aspect-ratio 8 --tensor-model-parallel-size 2 --sequence-parallel "
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --eval-interval 4"),
    "dp2 ep2": (2, "--train-model sambay_gqa4_moe --aspect-ratio 9 --sparsity 3 --top-k 3 --shared-expert --bf16 "
        "--expert-model-parallel-size 2 --overlap-grad-reduce --overlap-param-gather --eval-interval 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and beside it a tokenizer, which has not made it."""
    directory = tmp_path_factory.mktemp("data")
    train_bpe(directory / "tokenizer")
    return write_dataset(directory / "stdlib")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = write_tasks(tmp_path_factory.mktemp("tasks") / "small")
    return ["--eval-tasks", NAMES, "--eval-include-path", str(directory), "--eval-limit", "5"]


def command(data: Path, run: Path, *options: str) -> list[str]:
    return [
        "pretrain_archscale.py", *MODEL.split(), "--data-path", str(data), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(data.parent / "tokenizer"), "--seq-length", "32", "--micro-batch-size", "2",
        "--global-batch-size", "8", "--train-iters", str(STEPS), "--lr", "1e-2", "--clip-grad", "1.0",
        "--use-distributed-optimizer", "--save", str(run), "--eval-iters", "1",
        "--log-interval", "1", "--tensorboard-dir", str(run / "tensorboard"), "--tensorboard-log-interval", "1",
        "--num-workers", "1", "--split", "80,10,10", *options,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["tp2 pp2", pytest.param("dp2 ep2", marks=pytest.mark.slow)])
def test_training_does_not_notice(data: Path, tasks: list[str], tmp_path: Path, layout: str) -> None:
    processes, options = RUNS[layout]
    log = torchrun(processes, *command(data, tmp_path / "with", *options.split(), *tasks)).stdout
    torchrun(processes, *command(data, tmp_path / "without", *options.split()))
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        found, expected = (scalars(tmp_path / name, tag) for name in ("with", "without"))
        assert found == expected and len(found) > 1, tag
    found, expected = (tensors(tmp_path / name, STEPS) for name in ("with", "without"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    interval = int(options.split()[-1])
    when = {*range(interval, STEPS + 1, interval), STEPS}
    found = {tag: scalars(tmp_path / "with", f"eval/{tag}") for tag in TAGS}
    assert all(set(values) == when for values in found.values()), found
    for name, value in scores_of_checkpoint(tmp_path / "with", tasks).items():
        assert found[name][STEPS] == pytest.approx(value, rel=2e-3 if "--bf16" in options else 1e-5), name
    bits = found["small_texts/bits_per_byte"]
    assert len(set(bits.values())) == len(when)
    assert len(re.findall(rf"iteration +{STEPS} \| .*{re.escape(f'bits_per_byte: {bits[STEPS]:.6E}')}", log)) == 1


def scores_of_checkpoint(run: Path, options: list[str]) -> dict[str, float]:
    """By the other engine, which knows nothing of Megatron's model."""
    from lm_eval.evaluator import evaluate

    from archscale_megatron.evaluation.lm_eval_model import ArchScaleLM
    from archscale_megatron.evaluation.transformers_engine import TransformersEngine

    names, include, limit = options[1::2]
    manager, found = load_tasks(names, include_path=Path(include))
    loaded: Any = manager.load(found)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    model = ArchScaleLM(engine=TransformersEngine(run))
    return {name: score.value for name, score in scores(evaluate(model, loaded, limit=int(limit))).items()}


def arguments(**options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    eval_tasks.add_options(parser)
    parser.set_defaults(eval_iters=1, full_validation=False, split="8,1,1", tokenizer_type="ByteLevelTokenizer")
    return argparse.Namespace(**vars(parser.parse_args([])) | options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eval_tasks": None, "eval_limit": 3.0}, "--eval-limit has no effect without --eval-tasks"),
        ({"eval_limit": 0.0}, "--eval-limit 0: must be above 0"),
        ({"eval_iters": 0}, "scored where validation is, and there is none; give --eval-iters 1 or more"),
        ({"split": "1,0,0"}, "--split 1,0,0 leaves no data for it"),
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer is none"),
        ({"eval_include_path": "nowhere"}, "--eval-include-path nowhere: no such directory"),
        ({"eval_tasks": "small_lost"}, "--eval-tasks small_lost: its dataset is not on this disk"),
    ],
)
def test_options_that_score_nothing(tasks: list[str], options: dict[str, Any], says: str) -> None:
    args = arguments(**{"eval_tasks": NAMES, "eval_include_path": tasks[3]} | options)
    with pytest.raises(ValueError) as raised:
        eval_tasks.check_options(args)
        eval_tasks.load(args)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_task_is_one_line_before_anything_is_built(data: Path, tmp_path: Path) -> None:
    options = ["--train-model", "samba", "--eval-tasks", "no_such"]
    finished = torchrun(1, *command(data, tmp_path / "run", *options), check=False)
    assert "pretrain_archscale: error: --eval-tasks no_such: lm-eval has no such task; see" in finished.stdout
    assert "exitcode  : 2" in finished.stdout and "building" not in finished.stdout
