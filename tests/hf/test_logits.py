"""Every family, tied and untied, as an export of a checkpoint from TP 2 x PP 2: its logits are Megatron's."""

from pathlib import Path

import pytest

from tests.hf.logits import CASES, Case, exported, save

FP32 = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logits")
    save(path, CASES)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def test_logits(directory: Path, case: Case) -> None:
    format, difference = exported(directory, case)
    family = case[0].split("-")[0]
    plain = {"transformer", "transformer_mha", "transformer_gqa4", "transformer_gqa4_h2"}
    assert format == ("llama" if family in plain else "phi4flash" if family == "phi4miniflash" else "archscale")
    assert difference < FP32
