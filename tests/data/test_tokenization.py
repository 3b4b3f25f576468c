"""Token ids against megatron-core's own tokenizers; gigatoken against `tokenizers` on odd texts and all of Unicode."""

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from archscale_megatron.data import gigatoken_bpe, tokenization
from archscale_megatron.data.gigatoken_bpe import GigatokenTokenizer, NotExactError
from archscale_megatron.data.tokenization import HuggingFaceTokenizer, TokenizerError, load_tokenizer
from tests.data.models import LONG_DOCUMENTS, ODD_DOCUMENTS, corpus, save_tokenizer, train_bpe, train_sentencepiece

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


def variant(bpe, directory, change, **config):
    """The directory of a changed copy of the BPE tokenizer."""
    tokenizer = Tokenizer.from_file(f"{bpe}/tokenizer.json")
    change(tokenizer)
    return save_tokenizer(tokenizer, directory, **{"eos_token": "<|endoftext|>", **config})


def add_bos(tokenizer):
    bos = ("<|start|>", tokenizer.token_to_id("<|start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A <|start|>", special_tokens=[bos])


def llama3_split(tokenizer):
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])


def truncate(tokenizer):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)


def prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


HF_VARIANTS = {
    "plain": (lambda t: None, {}),
    "bos and suffix": (add_bos, {"bos_token": "<|start|>"}),
    "llama3": (llama3_split, {}),
    "truncating file": (truncate, {}),
    "prefix space, which transformers drops": (prefix_space, {}),
    "prefix space, kept": (prefix_space, {"add_prefix_space": True}),
    "eos is an ordinary piece": (lambda t: None, {"eos_token": "def"}),
    "sep stands in for eos": (lambda t: None, {"eos_token": None, "sep_token": "<|start|>"}),
    "GPT2 class": (lambda t: None, {"tokenizer_class": "GPT2TokenizerFast", "unk_token": "<|endoftext|>"}),
    "added tokens": (lambda t: t.add_tokens([AddedToken("  ", lstrip=True), AddedToken("<s>", rstrip=True)]), {}),
    "new token": (lambda t: None, {"pad_token": "<pad>"}),
}


@pytest.mark.parametrize("backend", ["auto", "tokenizers"])
@pytest.mark.parametrize("name", HF_VARIANTS)
def test_hugging_face_equals_megatron(bpe, tmp_path, name, backend, capsys):
    change, config = HF_VARIANTS[name]
    model = variant(bpe, tmp_path, change, **config)
    reference = MegatronTokenizer.from_pretrained(tokenizer_path=model, metadata_path={"library": "huggingface"})
    assert_equal(load_tokenizer("HuggingFaceTokenizer", model, backend), reference, long=name == "plain")
    assert capsys.readouterr().err == ""  # no fall back


def test_sentencepiece_equals_megatron(sentencepiece):
    reference = MegatronTokenizer.from_pretrained(
        tokenizer_path=sentencepiece, metadata_path={"library": "sentencepiece"}
    )
    assert_equal(load_tokenizer("SentencePieceTokenizer", sentencepiece), reference)


def test_bytes_equal_megatron():
    assert_equal(
        load_tokenizer("ByteLevelTokenizer", None),
        MegatronTokenizer.from_pretrained(metadata_path={"library": "byte-level"}),
    )


def assert_equal(tokenizer, reference, long=True):
    texts = ODD_DOCUMENTS + corpus()[-2:] + LONG_DOCUMENTS * long
    assert (tokenizer.vocab_size, tokenizer.eod) == (reference.vocab_size, reference.eod)
    ids, lengths = tokenizer.encode(texts)
    ends = np.cumsum(lengths)
    assert len(ids) == ends[-1]
    for text, end, length in zip(texts, ends, lengths, strict=True):
        assert ids[end - length : end].tolist() == reference.tokenize(text), repr(text[:50])


@pytest.mark.parametrize("change", [lambda t: None, llama3_split], ids=["gpt2", "llama3"])
def test_gigatoken_equals_tokenizers_on_all_of_unicode(bpe, tmp_path, change):
    """Fails when another release of either brings other Unicode tables: then _UNICODE_17 is to be updated."""
    reference = HuggingFaceTokenizer(variant(bpe, tmp_path, change))
    fast = GigatokenTokenizer(reference)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [f"{chr(code)}'s" for code in codes if code < 0x40000 or code % 64 == 0]
    for some in itertools.batched(texts, 50_000):
        for ours, theirs in zip(fast.encode(some), reference.encode(some), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    unrouted = fast._fast.encode_batch_list(["\U00032903's"])[0]
    assert unrouted != reference.encode(["\U00032903's"])[0].tolist(), "gigatoken agrees now: drop _UNICODE_17"


def test_gigatoken_equals_tokenizers_on_random_text(bpe):
    reference = HuggingFaceTokenizer(bpe)
    fast = GigatokenTokenizer(reference)
    rng = random.Random(0)
    pieces = [
        "<|endoftext|>",
        "<|start|>",
        "<|",
        "|>",
        " ",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "\0",
        "a",
        "B",
        "1",
        "\u0301",
    ]
    texts = [
        "".join(
            rng.choice(pieces) if rng.random() < 0.7 else chr(rng.randrange(0xD800)) for _ in range(rng.randrange(40))
        )
        for _ in range(20_000)
    ]
    for ours, theirs in zip(fast.encode(texts), reference.encode(texts), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def wordpiece_bpe(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def matches_words(tokenizer):
    tokenizer.add_tokens([AddedToken("def", single_word=True)])


def matches_normalised(tokenizer):
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("e\u0301", normalized=True)])


@pytest.mark.parametrize(
    "change, reason",
    [
        (matches_words, "matches the added token 'def' in other places"),
        (matches_normalised, "matches the added token"),
        (wordpiece_bpe, "does not take this tokenizer"),
    ],
)
def test_tokenizer_that_gigatoken_gets_wrong(bpe, tmp_path, change, reason, capsys):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", variant(bpe, tmp_path, change))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    message = capsys.readouterr().err
    assert reason in message and "using tokenizers" in message and message.count("\n") == 1


def test_gigatoken_missing(bpe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert load_tokenizer("HuggingFaceTokenizer", bpe).backend == "tokenizers"
    assert "cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("text", gigatoken_bpe.ODD_TEXTS)
def test_wrong_ids_are_found_at_the_start(bpe, monkeypatch, text):
    """Whichever odd text gigatoken should get wrong, it is not taken."""
    encode = GigatokenTokenizer.encode

    def wrong(self, texts):
        ids, lengths = encode(self, texts)
        return (np.append(ids, 7), lengths) if texts[0] == text else (ids, lengths)

    monkeypatch.setattr(GigatokenTokenizer, "encode", wrong)
    with pytest.raises(NotExactError, match="its ids differ"):
        GigatokenTokenizer(HuggingFaceTokenizer(bpe))


def test_cache_is_renewed_and_bounded(bpe, monkeypatch):
    """Random words: without renewal gigatoken's memory grows by 8 bytes for each of text."""
    monkeypatch.setattr(gigatoken_bpe, "_CACHE_BYTES", 64 << 20)
    reference = HuggingFaceTokenizer(bpe)
    fast = GigatokenTokenizer(reference)
    loads, load = [], fast._load
    fast._load = lambda: loads.append(1) or load()
    rng = np.random.default_rng(0)
    start = gigatoken_bpe.resident_bytes()
    for i in range(40):
        words = rng.integers(97, 123, size=(100_000, 10), dtype=np.uint8)
        words[:, 0] = 32
        text = words.tobytes().decode()
        ids, _ = fast.encode([text])
        assert gigatoken_bpe.resident_bytes() - start < 200 << 20
        if i % 20 == 0:
            np.testing.assert_array_equal(ids[:2000], reference.encode([text[:20_000]])[0][:2000])
    assert 2 <= len(loads) <= 10


def test_plain_directory_is_loaded_as_transformers_would(bpe, tmp_path):
    """What save_pretrained writes takes the fast route, and it makes the same tokenizer as the slow one."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(bpe).save_pretrained(tmp_path)
    assert {"special_tokens_map.json", "tokenizer_config.json"} <= {path.name for path in Path(tmp_path).iterdir()}
    fast, eos = tokenization._load_plain(str(tmp_path))
    slow, slow_eos = tokenization._load_with_transformers(str(tmp_path))
    assert json.loads(fast.to_str()) == json.loads(slow.to_str()) and eos == slow_eos == "<|endoftext|>"


@pytest.mark.parametrize("tokenizer_type", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
@pytest.mark.parametrize("model", [None, "missing", "garbage"])
def test_unusable_model(tmp_path, tokenizer_type, model):
    if model:
        model = str(tmp_path / model)
    if model and model.endswith("garbage"):
        (tmp_path / "garbage").write_bytes(b"garbage")
    with pytest.raises(TokenizerError, match="--tokenizer-model") as error:
        load_tokenizer(tokenizer_type, model)
    assert "\n" not in str(error.value)


def test_slow_tokenizer_is_refused(tmp_path):
    save_tokenizer(Tokenizer(models.BPE()), tmp_path, tokenizer_class="ByT5Tokenizer")
    with pytest.raises(TokenizerError, match=r"has no tokenizer.json"):
        load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
