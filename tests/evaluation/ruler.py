"""lm-eval's RULER tasks, with stand-ins for the packages that give them words and sentences."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from archscale_megatron.evaluation.words import ADJECTIVES, NOUNS

ITEMS = 5


@contextlib.contextmanager
def installed(essay: Sequence[str]) -> Iterator[Any]:
    """lm-eval's `niah_utils`, which make `ITEMS` items of each length, of an `essay`'s words."""
    wonderwords, nltk = ModuleType("wonderwords"), ModuleType("nltk")
    words = {"nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": []}
    wonderwords.RandomWord = lambda: SimpleNamespace(_categories=words)  # type: ignore[attr-defined]
    nltk.sent_tokenize = lambda text: re.split(r"(?<=\.) ", text)  # type: ignore[attr-defined]
    nltk.data = SimpleNamespace(find=lambda name: name)  # type: ignore[attr-defined]
    version = importlib.metadata.version
    with forgotten(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", wonderwords)
        patch.setitem(sys.modules, "nltk", nltk)
        patch.setattr(importlib.metadata, "version", lambda name: "3.9.1" if name == "nltk" else version(name))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        from lm_eval.tasks.ruler import niah_utils

        haystacks = {"repeat": niah_utils.get_haystack("repeat"), "needle": niah_utils.get_haystack("needle")}
        patch.setattr(niah_utils, "get_haystack", lambda type_haystack: haystacks.get(type_haystack, essay))
        generate = niah_utils.generate_samples
        patch.setattr(
            niah_utils, "generate_samples", lambda *a, **given: generate(*a, **given | {"num_samples": ITEMS})
        )
        yield niah_utils


@contextlib.contextmanager
def missing() -> Iterator[None]:
    """The packages are not there."""
    with forgotten(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", None)
        yield


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """What is imported of RULER inside is not known before and after."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        del sys.modules[name]
