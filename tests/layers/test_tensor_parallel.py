"""Two tensor-parallel ranks compute what one does: outputs, memories, all gradients, and checkpoints."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import torchrun
from tests.layers.mixers import SPECS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixers")
    torchrun(2, "-m", "tests.layers.worker", str(directory))
    return directory


@pytest.mark.parametrize("layout", ["tp2", "stp2"])
@pytest.mark.parametrize("kind", SPECS)
def test_layout_equals_single_process(runs: Path, kind: str, layout: str) -> None:
    expected, actual = (load_file(runs / f"{kind}.{name}.safetensors") for name in ("single", layout))
    assert actual.keys() == expected.keys()
    wrong = {
        name: d for name, e in expected.items() if not (d := (actual[name] - e).abs().max() / e.abs().max()) < 1e-5
    }
    assert not wrong


@pytest.mark.parametrize("kind", SPECS)
def test_checkpoint_of_two_ranks_loads_on_one(runs: Path, kind: str) -> None:
    saved, loaded = (load_file(runs / f"{kind}.{name}.safetensors") for name in ("saved", "loaded"))
    assert loaded.keys() == saved.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in saved.items())
