"""Text to the token ids of Megatron's tokenizers, in batches, without importing torch or megatron.

| --tokenizer-type       | ids are those of                                       | end of document    |
|------------------------|--------------------------------------------------------|--------------------|
| HuggingFaceTokenizer   | AutoTokenizer(text).input_ids (a fast one)             | eos_token, or sep  |
| SentencePieceTokenizer | SentencePieceProcessor.encode_as_ids(text)             | eos_id             |
| ByteLevelTokenizer     | text.encode(), vocabulary 512 (library "byte-level")   | 0                  |

Read against megatron-core 0.19.2 (core/tokenizers/text/libraries).
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "ByteLevelTokenizer")
BACKENDS = ("auto", "tokenizers")

Ids = NDArray[np.integer]


class TokenizerError(Exception):
    """The tokenizer cannot be used; the message is one line for the user."""


class Tokenizer(Protocol):
    """What preprocessing needs of a tokenizer. Its methods are called from several threads at once."""

    vocab_size: int
    eod: int | None
    backend: str
    """The library that makes the ids, for the log."""

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Ids of all `texts` back to back [tokens], and the number of ids of each text [len(texts)]."""
        ...

    def check(self, text: str, ids: Ids) -> None:
        """Raise an error if `ids`, made by `encode`, are not the reference ids of `text`."""
        ...


def load_tokenizer(tokenizer_type: str, model: str | None, backend: str = "auto") -> Tokenizer:
    """The tokenizer that Megatron's `--tokenizer-type` and `--tokenizer-model` name.

    `backend` "auto" takes gigatoken for a Hugging Face byte-level BPE where its ids are those of `tokenizers`,
    and says on stderr where they are not; "tokenizers" never does. Raises TokenizerError.
    """
    if tokenizer_type == "ByteLevelTokenizer":
        return ByteLevelTokenizer()
    if model is None:
        raise TokenizerError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model)
    reference = HuggingFaceTokenizer(model)
    if backend == "tokenizers":
        return reference
    from archscale_megatron.data.gigatoken_bpe import GigatokenTokenizer, NotExactError

    try:
        return GigatokenTokenizer(reference)
    except NotExactError as error:
        print(f"gigatoken is not used: {error}; using tokenizers, which is slower", file=sys.stderr)
        return reference


class ByteLevelTokenizer:
    """UTF-8 bytes. Megatron's end of document is 0, the id of a NUL byte."""

    vocab_size = 512
    eod: int | None = 0
    backend = "bytes"

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        data = [text.encode() for text in texts]
        return np.frombuffer(b"".join(data), np.uint8), np.array([len(item) for item in data], np.int64)

    def check(self, text: str, ids: Ids) -> None:
        """The ids are the reference."""


class SentencePieceTokenizer:
    """A sentencepiece `.model` file."""

    backend = "sentencepiece"

    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if not os.path.isfile(model):
            raise TokenizerError(f"--tokenizer-model {model}: no such file; SentencePieceTokenizer takes a .model file")
        try:
            self._processor = SentencePieceProcessor(model_file=model)
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"--tokenizer-model {model}: not a SentencePiece model") from error
        self.vocab_size = int(self._processor.get_piece_size())
        eod = int(self._processor.eos_id())
        self.eod = eod if eod >= 0 else None

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        return flatten(self._processor.encode(list(texts), out_type="numpy", num_threads=1))

    def check(self, text: str, ids: Ids) -> None:
        """The ids are the reference."""


class HuggingFaceTokenizer:
    """A Hugging Face fast tokenizer (`tokenizers`), with its post-processor (a BOS, if it adds one)."""

    backend = "tokenizers"

    def __init__(self, model: str) -> None:
        self.tokenizer, eos = _load_plain(model) or _load_with_transformers(model)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = int(self.tokenizer.get_vocab_size(with_added_tokens=True))
        self.eod = None if eos is None else self.tokenizer.token_to_id(eos)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        return flatten([np.array(encoding.ids, np.int32) for encoding in self.tokenizer.encode_batch_fast(list(texts))])

    def check(self, text: str, ids: Ids) -> None:
        """The ids are the reference."""


def flatten(documents: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Back to back, and their lengths."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    return (np.concatenate(documents) if documents else np.empty(0, np.int32)), lengths


NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HARMLESS = (
    "tokenizer_class",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "chat_template",
    "padding_side",
)


def _load_plain(model: str) -> tuple[Any, str | None] | None:
    """(tokenizers.Tokenizer, its end token) of a directory whose tokenizer.json says everything, else None.

    Importing transformers takes a second, but its tokenizer classes may change what tokenizer.json says (add a
    BOS, a prefix space, tokens). PreTrainedTokenizerFast changes nothing if the conditions below hold.
    """
    from tokenizers import Tokenizer

    try:
        with open(os.path.join(model, "tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        with open(os.path.join(model, "tokenizer.json"), encoding="utf-8") as file:
            tokenizer = Tokenizer.from_str(file.read())
        specials = {}
        if os.path.exists(specials_map := os.path.join(model, "special_tokens_map.json")):
            with open(specials_map, encoding="utf-8") as file:
                specials = json.load(file)
    except Exception:  # tokenizers raises no narrower class; transformers will say what is wrong
        return None
    tokens = tokenizer.get_added_tokens_decoder()
    by_content = {token.content: token for token in tokens.values()}
    named = {name: config.get(name) for name in NAMED}
    plain = (
        config.get("tokenizer_class") == "PreTrainedTokenizerFast"
        and set(config) <= {*NAMED, *_HARMLESS, "added_tokens_decoder", "extra_special_tokens"}
        and all(_is_token(spec, by_content) for spec in named.values() if spec is not None)
        and all(
            _is_token(spec, by_content) and tokens[int(key)].content == spec["content"]
            for key, spec in config.get("added_tokens_decoder", {}).items()
        )
        and all(
            named.get(name) is not None and _content(named[name]) == _content(spec) and _is_token(spec, by_content)
            for name, spec in specials.items()
        )
        and not config.get("extra_special_tokens")
        and not os.path.exists(os.path.join(model, "added_tokens.json"))
        and tokenizer.padding is None  # it brings a token
        and not getattr(tokenizer.pre_tokenizer, "add_prefix_space", False)
    )
    if not plain:
        return None
    promoted, eos = megatron_roles({name: spec if spec is None else _content(spec) for name, spec in named.items()})
    tokenizer.add_special_tokens(list(promoted.values()))
    return tokenizer, eos


def _content(spec: str | dict[str, Any]) -> str:
    return spec if isinstance(spec, str) else str(spec["content"])


def _is_token(spec: str | dict[str, Any], tokens: dict[str, Any]) -> bool:
    """Whether a token of tokenizer_config.json is in tokenizer.json with the same properties."""
    token = tokens.get(_content(spec))
    if token is None or isinstance(spec, str):
        return token is not None and token.special
    return all(getattr(token, name) == value for name, value in spec.items() if not name.startswith("__"))


def _load_with_transformers(model: str) -> tuple[Any, str | None]:
    """(tokenizers.Tokenizer, its end token) as AutoTokenizer makes it."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises nearly anything for a directory it cannot use
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TokenizerError(f"--tokenizer-model {model}: not a Hugging Face tokenizer ({reason})") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"--tokenizer-model {model}: has no tokenizer.json; save it as a fast tokenizer first")
    promoted, eos = megatron_roles({name: tokenizer.special_tokens_map.get(name) for name in NAMED})
    tokenizer.add_special_tokens(promoted)
    return tokenizer.backend_tokenizer, eos


def megatron_roles(named: dict[str, str | None]) -> tuple[dict[str, str], str | None]:
    """Roles that Megatron's wrapper gives away (eos and sep, bos and cls for each other), and the end token.

    A token given a role becomes a special token: found in text, it is one id.
    """
    promoted = {}
    for role, substitute in (
        ("sep_token", "eos_token"),
        ("eos_token", "sep_token"),
        ("cls_token", "bos_token"),
    ):
        if not named[role] and (token := named[substitute]):
            promoted[role] = token
    if not named["bos_token"] and (token := named["cls_token"]):
        promoted["bos_token"] = token
    return promoted, named["eos_token"] or named["sep_token"]
