"""The arithmetic of `scaling plan`, written out again."""

import json

import pytest

from archscale_megatron.scaling.__main__ import main


def planned(capsys: pytest.CaptureFixture[str], arguments: str) -> dict:
    main(["plan", *arguments.split(), "--json"])
    return json.loads(capsys.readouterr().out)


# Derived tokens and steps of ArchScale: d, T in units of 1e7, steps at 2^21.
SAMBAY = [(8, 1267, 6041), (12, 4276, 20390), (16, 10136, 48334), (20, 19798, 94402), (24, 34210, 163127)]
TRANSFORMER = [(8, 1250, 5960), (12, 4219, 20116), (16, 10000, 47683), (20, 19531, 93132), (24, 33750, 160932)]
# Other families at depth 8, tokens in units of 1e7.
OTHERS = {"sambayoco": 1266, "samba": 1277}


@pytest.mark.parametrize(
    "family, depth, tokens, steps", [("sambay", *r) for r in SAMBAY] + [("transformer", *r) for r in TRANSFORMER]
)
def test_archscales_rule(capsys: pytest.CaptureFixture[str], family: str, depth: int, tokens: int, steps: int) -> None:
    found = planned(capsys, f"--train-model {family} --depth {depth} --rule archscale")
    assert (round(found["tokens"] / 1e7), found["steps"]) == (tokens, steps)


@pytest.mark.parametrize("family", OTHERS)
def test_archscales_rule_of_other_families(capsys: pytest.CaptureFixture[str], family: str) -> None:
    found = planned(capsys, f"--train-model {family} --depth 8 --rule archscale")
    assert round(found["tokens"] / 1e7) == OTHERS[family]
    base = planned(capsys, f"--train-model {family} --depth 8 --rule archscale --base-hps.t0 5e10 --base-hps.d0 8")
    assert base["tokens"] == pytest.approx(found["tokens"] / 2 * 8, abs=4)


def test_archscales_later_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 2026-03 the base has depth 8: 9.5e9 tokens there, 27 times as many at depth 24."""
    for depth, tokens in ((8, 9_500_000_000), (24, 27 * 9_500_000_000)):
        found = planned(capsys, f"--train-model sambay --depth {depth} --rule archscale --archscale-release 2026-03")
        assert found["tokens"] == tokens


def test_a_family_is_counted_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    from archscale_megatron.archs.build import build_architecture
    from archscale_megatron.archs.counts import parameters, training_flops

    found = planned(capsys, "--train-model sambay --depth 16 --seq-length 8192 --untie-embeddings-and-output-weights")
    arch = build_architecture("sambay", 16, tied_embeddings=False)
    assert found["parameters"] == parameters(arch)
    assert found["tokens"] == 20 * parameters(arch)
    assert found["flops_per_token"] == training_flops(arch, 8192)
    assert found["flops"] == pytest.approx(20 * parameters(arch) * training_flops(arch, 8192))


def test_hours_days_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """7e9 parameters, 140e9 tokens, 5.88e21 FLOPs; a GPU at 500 TFLOP/s and 50% does 0.9e18 an hour."""
    found = planned(capsys, "--parameters 7e9 --gpus 100 --peak-tflops 500 --mfu 0.5 --price 2 --batch-tokens 4e6")
    assert (found["tokens"], found["steps"], found["batch_tokens"]) == (140_000_000_000, 35_000, 4_000_000)
    assert found["flops"] == pytest.approx(5.88e21)
    assert found["gpu_hours"] == pytest.approx(5.88e21 / 0.9e18)
    assert found["days"] == pytest.approx(5.88e21 / 0.9e18 / 100 / 24)
    assert found["cost"] == pytest.approx(2 * 5.88e21 / 0.9e18)


@pytest.mark.parametrize("ratio", [20, 50])
def test_budget_alone_gives_chinchillas_model(capsys: pytest.CaptureFixture[str], ratio: int) -> None:
    found = planned(capsys, f"--flops 1e21 --tokens-per-parameter {ratio}")
    assert 6 * found["parameters"] * found["tokens"] == pytest.approx(1e21, rel=1e-6)
    assert found["tokens_per_parameter"] == pytest.approx(ratio, rel=1e-6)


def test_budget_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--train-model sambay --depth 24 --flops 1e21")
    assert found["tokens"] * found["flops_per_token"] == pytest.approx(1e21, rel=1e-6)
    assert found["cost"] is None
    assert planned(capsys, "--parameters 1e9 --max-tokens 5_000_000_000")["tokens"] == 5_000_000_000


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--train-model", "sambay", "--depth", "16", "--rule", "archscale", "--price", "2.5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "model", "parameters", "FLOPs a token", "tokens", "steps", "FLOPs", "GPU-hours", "days", "cost",
    ]  # fmt: skip
    assert "48,334  of 2,097,152 tokens" in lines[4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "give a model (--train-model and --depth, or --parameters) or a budget (--flops)"),
        ("--train-model sambay", "--train-model and --depth: give both"),
        ("--train-model sambay --depth 16 --parameters 1e9", "give both, and no --parameters"),
        ("--train-model sambae --depth 16", "unknown family; did you mean"),
        ("--train-model swayoco --depth 16 --rule archscale", "no law for the training tokens of swayoco"),
        ("--parameters 1e9 --rule archscale", "--rule archscale: is of a family"),
        ("--parameters nan", "--parameters nan: must be a positive number"),
        ("--parameters 1e9 --base-hps.t0 -1", "--base-hps.t0 -1: must be a positive number"),
        ("--parameters 1e9 --mfu 40", "--mfu 40: must be more than 0, and 1 at most"),
        ("--parameters 1e9 --flops 1e20 --max-tokens 1e9", "not allowed with argument"),
        ("--parameters lots", "invalid float value: 'lots'"),
        ("--flops 1e9", "less than one batch; give a smaller --batch-tokens"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments.split()])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
