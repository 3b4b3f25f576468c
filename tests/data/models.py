"""Small tokenizers trained on the standard library, and texts that tokenizers tend to get wrong."""

import json
import pathlib
import sysconfig
from typing import Any

ODD_DOCUMENTS = [
    "plain text, it's 12345 words",
    "",
    " ",
    "\n",
    "NUL \0 inside\0",
    "windows\r\nlines\r\n\r\nand\rmac",
    "\t\ttabs  and   spaces    ",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> <|endoftext|><|endoftext|>\n",
    "<s> literal </s><unk><pad><0x0A>",
    "emoji \U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f1e9\U0001f1ea",
    "e\u0301 \u00e9 \ufb01 \u01c5 \u017f's \u212a \u00b2\u2177 \u0661\u0662\u0663",
    "\u65e5\u672c\u8a9e\u3001\u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\ufeff\u200b\u202e\u2028\u2029\x85\xa0\u3000\ufffd\ufffe\U0010ffff",
    "\U00032903's new in Unicode 17 \u0295's",
    "\u2581 the SentencePiece space \u2581\u2581",
    " " * 5_000,
    "last",
]
LONG_DOCUMENTS = ["x" * 1_000_000, "word 123\n" * 120_000, "\u65e5\u672c\U0001f600<|endoftext|>" * 60_000]


def corpus() -> list[str]:
    """Some 3 MB of Python."""
    return [path.read_text("utf-8") for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]]


def train_bpe(directory: pathlib.Path, **config: Any) -> str:
    """A GPT-2 style BPE tokenizer of 2,000 ids in a Hugging Face directory; `config` goes to tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus()[:40], trainer)
    return save_tokenizer(tokenizer, directory, **{"eos_token": "<|endoftext|>", **config})


def save_tokenizer(tokenizer: Any, directory: pathlib.Path, **config: Any) -> str:
    """Write a directory that AutoTokenizer loads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)


def train_sentencepiece(directory: pathlib.Path) -> str:
    """A SentencePiece BPE model of 2,000 ids with byte fallback."""
    import sentencepiece

    lines = (line for text in corpus()[:40] for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(directory / "sp"),
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(directory / "sp.model")
