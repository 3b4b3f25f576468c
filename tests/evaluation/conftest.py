"""Tokenizers of the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.models import train_bpe
from tests.evaluation import answering


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE of 2,000 ids."""
    return Path(train_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="session")
def bpe(bpe_directory: Path) -> Any:
    """The tokenizer in it."""
    return answering.tokenizer(bpe_directory)


@pytest.fixture(scope="session")
def bpe_with_start(bpe_directory: Path) -> Any:
    """One that puts a token before each text."""
    return answering.tokenizer(bpe_directory, start=True)
