"""No parallel layout changes the result: losses, gradients and updated parameters, tensor by tensor."""

from pathlib import Path

import pytest

from archscale_megatron.archs.splits import payloads
from tests.parallel.compare import differences, run_all, tolerance
from tests.parallel.layouts import EXPERTS, LAYOUTS, MODELS, SUBSET, pattern_of, tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    list(run_all(directory, SUBSET))
    return directory


@pytest.mark.parametrize(("model", "name"), SUBSET)
def test_layout_equals_single_process(runs: Path, model: str, name: str) -> None:
    found = differences(runs, model, name)
    kinds = {"loss"} if LAYOUTS[name].bf16 and model in EXPERTS else {"loss", "grad", "param"}
    assert {key.split(".")[0] for key in found} == kinds
    allowed = tolerance(runs, model, name)
    wrong = {key: value for key, value in found.items() if not value <= allowed}
    assert not wrong


def test_the_subset_has_every_layout_and_every_model() -> None:
    assert {name for _, name in SUBSET} == set(LAYOUTS)
    assert {model for model, _ in SUBSET} == set(MODELS)


def test_recompute_is_exact(runs: Path) -> None:
    for name in ("recompute", "recompute_block", "recompute_attention"):
        assert max(differences(runs, "sambay", name).values()) == 0
    # Of three or more experts, Megatron adds the weights in another order where there are no gradients
    # (core/transformer/moe/moe_utils.py, `sorted=torch.is_grad_enabled()`).
    for name in ("recompute", "recompute_experts"):
        assert max(differences(runs, "sambay_gqa4_moe", name).values()) == 0


def test_layouts_cut_where_shared_state_crosses() -> None:
    """The layouts above would prove little if no boundary carried the memory and the keys and values."""
    arch = tiny("sambay")
    for name, crossing in {
        "pp4": [(), (), ("memory", "kv")],
        "pp2_vpp2": [(), (), ("memory", "kv")],
        "pp4_by_hand": [("memory",), ("memory", "kv"), ("memory", "kv")],
        "stp2_pp2_bf16": [("memory", "kv")],
    }.items():
        assert payloads(arch, pattern_of(arch, LAYOUTS[name])) == crossing, name
