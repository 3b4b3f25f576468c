"""The tokenizer files of an export: plain `transformers` then makes the ids that training saw.

| training                             | the export holds                                                      |
|--------------------------------------|-----------------------------------------------------------------------|
| HuggingFaceTokenizer                 | the tokenizer, with the roles that Megatron gives its tokens          |
| SentencePieceTokenizer (`SENTENCEPIECE`) | tokenizer.json with the model's pieces and merges                 |
| ByteLevelTokenizer (`data.tokenization`) | tokenizer.json with 256 bytes                                     |
| NullTokenizer                        | nothing                                                               |

What is written is read again with AutoTokenizer, and refused where its ids differ.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale_megatron.data.gigatoken_bpe import ODD_TEXTS
from archscale_megatron.data.tokenization import NAMED, TokenizerError, megatron_roles
from archscale_megatron.hf.folder import HFError, HFFolder

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TYPES = ("HuggingFaceTokenizer", *SENTENCEPIECE, "ByteLevelTokenizer", "NullTokenizer")
UNKNOWN_TO_EXPORTS = {
    "special_tokens": "--tokenizer-special-tokens", "metadata_path": "--tokenizer-metadata",
    "tokenizer_sentencepiece_legacy": "--tokenizer-sentencepiece-legacy", "trust_remote_code": "--trust-remote-code",
    "vocab_file": "--vocab-file", "merge_file": "--merge-file",
}  # fmt: skip
"""Megatron's options that change a tokenizer: attribute -> option."""
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces, in sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # types of models, there
NEVER = -1e6  # log probability
SPACE = "\u2581"
PIECES_OF_A_TEXT = 64  # of those with which a SentencePiece tokenizer is checked
RUNS_OF_SPACES = tuple(f"a{' ' * length}b" for length in range(2, 34))

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class SpecialIds:
    """Ids for config.json and generation_config.json; None where the tokenizer has none."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def write_tokenizer(
    directory: Path, tokenizer_type: str, model: str | None, options: Mapping[str, Any] | None = None
) -> SpecialIds:
    """Write the files of a training run's tokenizer into `directory`.

    Args:
        tokenizer_type, model: what training had as `--tokenizer-type` and `--tokenizer-model`.
        options: its other arguments, of which those in `UNKNOWN_TO_EXPORTS` are refused.
    Raises:
        HFError: the tokenizer is not there, is of another type, or `transformers` would make other ids.
    """
    for name, option in UNKNOWN_TO_EXPORTS.items():
        if (options or {}).get(name):
            raise HFError(f"{option}: the tokenizer of a run that had it cannot be exported")
    if tokenizer_type == "NullTokenizer":
        return SpecialIds()
    if tokenizer_type == "ByteLevelTokenizer":
        return _bytes(directory)
    if tokenizer_type not in TYPES:
        raise HFError(f"--tokenizer-type {tokenizer_type}: cannot be exported; those that can: {', '.join(TYPES)}")
    if model is None:
        raise HFError(f"--tokenizer-type {tokenizer_type}: the run does not say of which model")
    return (_sentencepiece if tokenizer_type in SENTENCEPIECE else _hugging_face)(directory, model)


def training_tokenizer(folder: HFFolder) -> dict[str, Any]:
    """What of run.json is the tokenizer of a model that was imported from `folder`."""
    if any(folder.has(name) for name in FILES):
        return {"type": "HuggingFaceTokenizer", "model": str(folder.path.resolve())}
    return {"type": "NullTokenizer", "model": None}


def _hugging_face(directory: Path, model: str) -> SpecialIds:
    tokenizer = _auto(model)
    promoted, eos = megatron_roles({name: tokenizer.special_tokens_map.get(name) for name in NAMED})
    tokenizer.add_special_tokens(promoted)
    tokenizer.save_pretrained(directory)
    _check(directory, model, lambda text: tokenizer(text).input_ids, ODD_TEXTS)
    return SpecialIds(
        tokenizer.bos_token_id, None if eos is None else tokenizer.convert_tokens_to_ids(eos), tokenizer.pad_token_id
    )


def _auto(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything for a directory it cannot use
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise HFError(f"{model}: transformers cannot load the tokenizer without running code ({reason})") from None


def _bytes(directory: Path) -> SpecialIds:
    """UTF-8 bytes; Megatron's end of document is byte 0, its padding byte 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = _letters_of_bytes()
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _save(directory, tokenizer, {"eos_token": letters[0], "pad_token": letters[1]})
    _check(directory, "ByteLevelTokenizer", lambda text: list(text.encode()), ODD_TEXTS)
    return SpecialIds(eos_token_id=0, pad_token_id=1)


def _letters_of_bytes() -> list[str]:
    """The letters that stand for the bytes 0 to 255 in byte-level tokenizers (GPT-2's): itself for a visible one,
    else the next of those from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _sentencepiece(directory: Path, model: str) -> SpecialIds:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    from archscale_megatron.data.tokenization import SentencePieceTokenizer

    try:
        SentencePieceTokenizer(model)  # for its errors
    except TokenizerError as error:
        raise HFError(str(error)) from None
    processor = SentencePieceProcessor(model_file=model)
    proto: Any = sentencepiece_model_pb2  # its classes are made at import
    spec = proto.ModelProto.FromString(Path(model).read_bytes())
    special = {
        name: processor.id_to_piece(i)
        for name, i in {
            "bos_token": processor.bos_id(), "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(), "pad_token": processor.pad_id(),
        }.items() if i >= 0
    }  # fmt: skip
    _save(directory, _converted(spec, model), special)
    texts = itertools.chain(ODD_TEXTS, RUNS_OF_SPACES, _texts_of_pieces(spec))
    _check(directory, model, processor.encode_as_ids, texts)
    ids = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    return SpecialIds(*(i if i >= 0 else None for i in ids))


def _converted(spec: Any, model: str) -> Any:
    """A SentencePiece model as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        raise HFError(f"{model}: only BPE and unigram models with the space before a word can be exported")
    vocabulary = {piece.piece: number for number, piece in enumerate(spec.pieces)}
    if trainer.model_type == BPE:
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                _merges(spec, vocabulary),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=True,  # a symbol that is alone in its part of the text needs none
            )
        )
    else:
        # Control pieces and bytes are never found in a text; a symbol always is.
        scores = {NORMAL: None, USER_DEFINED: 0.0}
        scored = [(piece.piece, scores.get(piece.type, NEVER) or piece.score) for piece in spec.pieces]
        tokenizer = Tokenizer(models.Unigram(scored, trainer.unk_id, trainer.byte_fallback))
    symbols = sorted((p.piece for p in spec.pieces if p.type == USER_DEFINED), key=len, reverse=True)
    if symbols:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated")
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(trainer.unk_piece, trainer.unk_surface),
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []),
        ]
    )
    control = [piece.piece for piece in spec.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer


def _merges(spec: Any, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first: SentencePiece merges the pair whose piece scores best."""
    merges = []
    for piece in spec.pieces:
        if piece.type == NORMAL:
            for cut in range(1, len(piece.piece)):
                left, right = piece.piece[:cut], piece.piece[cut:]
                if left in vocabulary and right in vocabulary:
                    merges.append((-piece.score, vocabulary[piece.piece], -cut, (left, right)))
    return [pair for *_, pair in sorted(merges)]


def _texts_of_pieces(spec: Any) -> Iterator[str]:
    """Texts that together hold every ordinary piece."""
    pieces = [piece.piece.replace(SPACE, " ") for piece in spec.pieces if piece.type in (NORMAL, USER_DEFINED)]
    for start in range(0, len(pieces), PIECES_OF_A_TEXT):
        yield "".join(pieces[start : start + PIECES_OF_A_TEXT])


def _save(directory: Path, tokenizer: Any, special: Mapping[str, str]) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' number for no limit
        # "</s>" in a text is text, as in training.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # else token_type_ids too, which `generate` refuses
        **special,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check(directory: Path, model: str, encode: Encode, texts: Iterable[str]) -> None:
    tokenizer = _auto(directory)
    for text in texts:
        if (got := tokenizer(text, add_special_tokens=True).input_ids) != (ids := encode(text)):
            at = next(n for n in range(len(ids) + 1) if got[: n + 1] != ids[: n + 1])
            raise HFError(
                f"{model}: transformers would tokenize {text[:40]!r} in another way (ids {got[at : at + 4]} for "
                f"{ids[at : at + 4]} from token {at} on); it cannot be exported"
            )
