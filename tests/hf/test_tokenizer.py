"""What plain AutoTokenizer makes of an export's tokenizer, against Megatron's tokenizer of the training run."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from megatron.core.tokenizers.text.libraries import (
    ByteLevelTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from tokenizers import processors
from transformers import AutoTokenizer

from archscale_megatron.data.gigatoken_bpe import ODD_TEXTS
from archscale_megatron.hf import tokenizer as module
from archscale_megatron.hf.folder import HFError, HFFolder
from archscale_megatron.hf.tokenizer import SpecialIds, training_tokenizer, write_tokenizer
from tests.data.models import ODD_DOCUMENTS, corpus, train_bpe

TEXTS = [text for text in (*ODD_DOCUMENTS, *ODD_TEXTS, *corpus()[40:44], "a<sep>b <sep> <sep><sep>c", "</s>x<pad>")]
LLAMA: dict[str, Any] = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}  # fmt: skip
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama with runs of spaces": LLAMA | {"allow_whitespace_only_pieces": True, "split_digits": True},
    "llama with symbols": LLAMA | {"user_defined_symbols": ["<sep>", "<sep><sep>"], "pad_id": 3},
    "no prefix": LLAMA | {"add_dummy_prefix": False, "bos_id": -1},
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": LLAMA | {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
}
IDS = {
    "llama with symbols": SpecialIds(1, 2, 3),
    "no prefix": SpecialIds(None, 2, None),
}


def train(directory: Path, **options: Any) -> str:
    lines = (line for text in corpus()[:40] for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(directory / "sp"), vocab_size=2000, minloglevel=2, **options
    )
    return str(directory / "sp.model")


def new(path: Path) -> Path:
    path.mkdir()
    return path


def assert_same_ids(export: Path, training: Any) -> None:
    """And the same text of them."""
    loaded = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    for text in TEXTS:
        ids = training.text_to_ids(text)
        assert loaded(text).input_ids == ids, text[:80]
        assert loaded.decode(ids) == training.ids_to_text(ids), text[:80]


@pytest.mark.parametrize("case", SENTENCEPIECE)
def test_sentencepiece(case: str, tmp_path: Path) -> None:
    model = train(tmp_path, **SENTENCEPIECE[case])
    export = new(tmp_path / "export")
    assert write_tokenizer(export, "SentencePieceTokenizer", model) == IDS.get(case, SpecialIds(1, 2, None))
    assert_same_ids(export, SentencePieceTokenizer(model))
    loaded = AutoTokenizer.from_pretrained(export)
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (
        *(
            (i if i >= 0 else None)
            for i in (SentencePieceTokenizer(model).bos_id, SentencePieceTokenizer(model).eos_id)
        ),
        2000,
    )


@pytest.mark.parametrize(
    "config, ids",
    [
        ({}, SpecialIds(None, 0)),
        ({"bos_token": "<|start|>"}, SpecialIds(1, 0)),
        ({"eos_token": None, "sep_token": "<|endoftext|>", "cls_token": "<|start|>"}, SpecialIds(1, 0)),
        ({"bos_token": "<|start|>", "pad_token": "<|endoftext|>", "begins": True}, SpecialIds(1, 0, 0)),
    ],
)
def test_hugging_face(config: dict[str, Any], ids: SpecialIds, tmp_path: Path) -> None:
    begins = config.pop("begins", False)
    model = train_bpe(tmp_path / "hf", **config)
    if begins:  # its post-processor adds a BOS
        loaded = AutoTokenizer.from_pretrained(model)
        loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
        loaded.save_pretrained(model)
    export = new(tmp_path / "export")
    assert write_tokenizer(export, "HuggingFaceTokenizer", model) == ids
    training = HuggingFaceTokenizer(model)
    assert_same_ids(export, training)


def test_bytes(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, "ByteLevelTokenizer", None) == SpecialIds(None, 0, 1)
    training = ByteLevelTokenizer()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text).input_ids == training.text_to_ids(text)
        assert loaded.decode(training.text_to_ids(text)) == text
    assert loaded.decode([72, 105, 0, 300, 1], skip_special_tokens=True) == "Hi"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (training.eos_id, training.pad_id)


def test_null_has_no_files(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, "NullTokenizer", None) == SpecialIds(None, None, None)
    assert list(tmp_path.iterdir()) == []


def code(folder: Path) -> str:
    """A tokenizer whose class is a file of its own folder; loading it would leave a file behind."""
    train_bpe(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    return str(folder)


def words(folder: Path) -> str:
    folder.mkdir()
    return train(folder, model_type="word", hard_vocab_limit=False)


@pytest.mark.parametrize(
    "tokenizer_type, model, message",
    [
        (
            "TikTokenizer",
            "x",
            "--tokenizer-type TikTokenizer: cannot be exported; those that can: HuggingFaceTokenizer",
        ),
        ("SentencePieceTokenizer", None, "the run does not say of which model"),
        ("SentencePieceTokenizer", "nowhere.model", "nowhere.model: no such file"),
        ("SentencePieceTokenizer", words, "only BPE and unigram models"),
        ("HuggingFaceTokenizer", "./nowhere", "./nowhere: transformers cannot load the tokenizer"),
        ("HuggingFaceTokenizer", code, "cannot load the tokenizer without running code"),
    ],
)
def test_refuses(tokenizer_type: str, model: Any, message: str, tmp_path: Path) -> None:
    model = model(tmp_path / "model") if callable(model) else model
    export = new(tmp_path / "export")
    with pytest.raises(HFError, match=message) as error:
        write_tokenizer(export, tokenizer_type, model)
    assert "\n" not in str(error.value)
    assert list(export.iterdir()) == []
    assert not (tmp_path / "model" / "ran").exists()


def test_refuses_options_that_change_the_ids(tmp_path: Path) -> None:
    with pytest.raises(HFError, match="--tokenizer-special-tokens: the tokenizer of a run"):
        write_tokenizer(tmp_path, "NullTokenizer", None, {"special_tokens": ["<x>"], "vocab_file": None})


def test_refuses_ids_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check after writing finds a converter that is wrong."""
    monkeypatch.setattr(module, "SPACE", "_")
    with pytest.raises(HFError, match=r"sp.model: transformers would tokenize .* in another way \(ids \["):
        write_tokenizer(new(tmp_path / "export"), "SentencePieceTokenizer", train(tmp_path, **LLAMA))


def test_imported_model_trains_with_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert training_tokenizer(HFFolder(tmp_path)) == {"type": "NullTokenizer", "model": None}
    train_bpe(tmp_path)
    assert training_tokenizer(HFFolder(tmp_path)) == {"type": "HuggingFaceTokenizer", "model": str(tmp_path)}
