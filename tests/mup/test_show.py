"""`show` and `table`: what they print, against the paper's numbers and ArchScale's rules written out again."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters
from archscale_megatron.mup.__main__ import main

Show = Callable[..., Any]
KEYS = {
    "learning_rate", "matrix_learning_rate", "global_batch_tokens", "train_tokens", "warmup_tokens",
    "logit_multiplier", "residual_multiplier", "parameters",
}  # fmt: skip
LAST = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
TIED = "--train_model sambay --depth 8 --train_name scaling_mup_tie"


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Show]:
    """What `show` prints for the options of a line: with --json as Python has it."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")  # put back afterwards
    monkeypatch.setattr("sys.argv", ["mup"])

    def run(line: str) -> Any:
        assert main(["show", *line.split()]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in line else printed

    yield run
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_as_json(show: Show, tied: bool) -> None:
    facts = show(f"{TIED if tied else TIED.removesuffix('_tie')} --base_hps.eta0 4e-4 --json")
    assert facts.keys() >= KEYS
    assert f"{facts['learning_rate']:.4e} {facts['matrix_learning_rate']:.4e}" == "5.6569e-04 1.1314e-03"
    assert (facts["global_batch_tokens"], facts["train_tokens"], facts["warmup_tokens"]) == (2**21, 12670477505, 10**9)
    assert (facts["logit_multiplier"], facts["residual_multiplier"]) == (2.0, 0.25)
    assert f"{facts['softmax_scale']:.6f}" == f"{1 / math.sqrt(128):.6f}"

    arch = build_architecture("sambay", 8, tied_embeddings=tied)
    found = {p["name"]: p for p in facts["parameters"]}
    assert len(found) == len(facts["parameters"])
    assert sum(math.prod(p["shape"]) for p in found.values()) == parameters(arch)
    assert ("output_layer.weight" in found) is not tied
    for name, p in found.items():
        # facts of ArchScale's get_param_groups: matrices are the weights of linear layers
        matrix = len(p["shape"]) == 2 and not name.endswith(("word_embeddings.weight", "output_layer.weight", "A_log"))
        rate = facts["matrix_learning_rate"] if matrix else facts["learning_rate"]
        assert (p["learning_rate"], p["weight_decay"]) == (pytest.approx(rate, rel=1e-12), 0.1 if matrix else 0.0), name
        if matrix:
            last = tied and name.endswith(LAST)
            assert p["init_std"] == pytest.approx((3 * p["shape"][1] * (16 if last else 1)) ** -0.5), name
            assert p["class"] == ("last matrix" if name.endswith(LAST) else "matrix"), name
    assert found["embedding.word_embeddings.weight"]["init_std"] == (0.02 if tied else 1e-4)
    if not tied:
        assert (found["output_layer.weight"]["init"], found["output_layer.weight"]["init_std"]) == ("0", 0.0)


def test_layouts_change_batches_and_not_the_model(show: Show) -> None:
    """Experts and stages as well; a batch is rounded to what the data-parallel ranks take."""
    line = "--train-model sambay_gqa4_moe --depth 8 --parametrization mup++ --max-tokens 1e10 --base-hps.b0 110000"
    line += " --lr 1e-3 --json"
    small = "--aspect-ratio 8 --head-dim 8 --top-k 4 --sparsity 2"
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --nodes 2"
    one = show(f"{line} {small} --gpus-per-node 1")
    many = show(f"{line} {small} {layout} --expert-model-parallel-size 2")
    assert [facts["global_batch_tokens"] for facts in (one, many)] == [13 * 8192, 3 * 4 * 8192]
    assert one["parameters"] == many["parameters"]
    assert sum(p["class"] == "router" for p in one["parameters"]) == 8


def test_page(show: Show) -> None:
    text = show(f"{TIED} --seed 7 --independent-weight-decay")
    assert "clip, seed      1, 7\n" in text
    rows = {line[6:].split()[0]: line.split() for line in text.splitlines() if ".weight " in line}
    row = rows["decoder.layers.*.mixer.linear_fc1.weight"]
    assert row[:2] == ["8", "x"]
    assert row[3:7] == ["7936", "x", "992", "matrix"]
    assert row[-3:] == ["0.01833", "1.1314e-03", f"{4e-5 / (8e-4 * math.sqrt(2)):g}"]
    assert rows["decoder.layers.*.norm.weight"][0] == "16"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show --nodes 0", "--nodes 0: must be 1 or more"),
        ("show --train-model sambay", "--depth is required"),
        ("show --train-model sambay --depth 8", "--lr is required, or what gives it"),
        (f"show {TIED} --base-hps.eta0 abc", "--base-hps.eta0 abc: not a number"),
        (f"show {TIED} --ctx-len 64 --seq-length 32", "say the same; give one of them"),
        ("table mamba", "ArchScale 2025-07 has no law for the training tokens of mamba"),
        ("table sambay --json", "unrecognized arguments: --json"),
    ],
)
def test_refused_with_one_line_and_code_2(
    show: Show, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("mup: error: ")
    assert message in errors[0]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "samba", "--depths", "8", "24"]) == 0
    header, *rows = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["8", "5.6569e-04", "1.1314e-03", "2.0000", "0.2500", "12.77B", "6,091"],
        ["24", "3.2660e-04", "2.1773e-04", "0.6667", "0.1443", "344.90B", "164,463"],
    ]
