"""No parallel layout changes the result: losses, gradients and updated parameters, tensor by tensor."""

from pathlib import Path

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.splits import payloads
from tests.parallel.compare import TOLERANCE, TOLERANCE_BF16, differences, run_all
from tests.parallel.layouts import CASES, LAYOUTS, TINY, pattern_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    run_all(directory)
    return directory


@pytest.mark.parametrize(("family", "name"), CASES)
def test_layout_equals_single_process(runs: Path, family: str, name: str) -> None:
    found = differences(runs, family, name)
    assert {key.split(".")[0] for key in found} == {"loss", "grad", "param"}
    tolerance = TOLERANCE_BF16 if LAYOUTS[name].bf16 else TOLERANCE
    wrong = {key: value for key, value in found.items() if not value <= tolerance}
    assert not wrong


def test_recompute_is_exact(runs: Path) -> None:
    for name in ("recompute", "recompute_block", "recompute_attention"):
        assert max(differences(runs, "sambay", name).values()) == 0
    # Of three or more experts, Megatron adds the weights in another order where there are no gradients
    # (core/transformer/moe/moe_utils.py, `sorted=torch.is_grad_enabled()`).
    for name in ("recompute", "recompute_experts"):
        assert max(differences(runs, "sambay_gqa4_moe", name).values()) == 0


def test_layouts_cut_where_shared_state_crosses() -> None:
    """The layouts above would prove little if no boundary carried the memory and the keys and values."""
    arch = build_architecture("sambay", **TINY)
    for name, crossing in {
        "pp4": [(), (), ("memory", "kv")],
        "pp2_vpp2": [(), (), ("memory", "kv")],
        "pp4_by_hand": [("memory",), ("memory", "kv"), ("memory", "kv")],
        "stp2_pp2_bf16": [("memory", "kv")],
    }.items():
        assert payloads(arch, pattern_of(arch, LAYOUTS[name])) == crossing, name
