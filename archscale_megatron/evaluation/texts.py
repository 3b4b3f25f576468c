"""Which tokens do local files hold? Texts, lines of JSON, Megatron's indexed datasets, raw tokens of ArchScale's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archscale_megatron.data.jsonl import DataError, read_batches, text_fields

RAW_DTYPE = np.dtype("<u2")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Document:
    """
    Attributes:
        ids: integers [n]; may be mapped from a file.
        bytes: of their text in UTF-8, None where there are only tokens.
        head: bytes of the first token, as far as the tokenizer says.
    """

    ids: NDArray[np.integer]
    bytes: int | None
    head: int = 0


def files_of(path: Path, raw_tokens: bool) -> list[Path]:
    """The files that `--data path` stands for: itself, or the .bin and .idx of an indexed dataset.

    Raises:
        ValueError: there is no such file, or nothing says what its tokens are.
    """
    pair = [_suffixed(path, suffix) for suffix in (".bin", ".idx")]
    if not raw_tokens and all(file.is_file() for file in pair):
        return pair
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file, nor {path}.bin with {path}.idx")
    if path.suffix == ".bin" and not raw_tokens:
        raise ValueError(f"--data {path}: has no .idx beside it; --raw-tokens reads it as uint16 tokens")
    return [path]


def _suffixed(path: Path, suffix: str) -> Path:
    """Of the prefix, or of either file of the pair."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix.with_name(prefix.name + suffix)


def read_documents(
    paths: Sequence[Path],
    tokenizer: Any,
    *,
    raw_tokens: bool = False,
    documents: int | None = None,
    tokens: int | None = None,
) -> Iterator[Document]:
    """The first `documents` documents of files and prefixes, in order, until there are `tokens` tokens.

    A text file is one document, as is a file of raw tokens; a line of JSON is one, its text under "text". The tokenizer
    adds no special tokens.

    Raises:
        ValueError: a file cannot be read, or holds tokens that the tokenizer does not have.
    """
    found = ((path, item) for path in paths for item in _read(path, raw_tokens))
    for path, item in itertools.islice(found, documents):
        document = encoded(item, tokenizer, tokens) if isinstance(item, str) else Document(item[:tokens], None)
        if document.ids.size and int(document.ids.max()) >= len(tokenizer):
            raise ValueError(
                f"--data {path}: holds the token {document.ids.max()}, and the model's tokenizer has "
                f"{len(tokenizer)}; the data were made with another one"
            )
        yield document
        if tokens is not None:
            tokens -= len(document.ids)
            if not tokens:
                return


def encoded(text: str, tokenizer: Any, tokens: int | None = None) -> Document:
    """A text's first `tokens` tokens."""
    encoding = tokenizer(text, add_special_tokens=False)

    def size(n: int) -> int:
        """Bytes of the first n tokens."""
        last = encoding.token_to_chars(n - 1) if n < len(encoding.input_ids) else None
        return len((text[: last.end] if last else text).encode())

    ids = np.array(encoding.input_ids[:tokens], np.int32)
    return Document(ids, size(len(ids)), size(1) if len(ids) else 0)


def joined(documents: Iterable[Document], between: Sequence[int]) -> Document:
    """All documents as one. Behind a text that another document follows, there are the tokens `between`; datasets of
    tokens have their own."""
    all_documents = list(documents)
    parts: list[NDArray[np.integer]] = []
    for i, document in enumerate(all_documents):
        parts.append(document.ids)
        if document.bytes is not None and i + 1 < len(all_documents):
            parts.append(np.array(between, np.int32))
    sizes = [document.bytes for document in all_documents]
    known = [size for size in sizes if size is not None]
    ids = np.concatenate(parts) if parts else np.array([], np.int32)
    return Document(ids, sum(known) if len(known) == len(sizes) else None, all_documents[0].head if parts else 0)


def _read(path: Path, raw_tokens: bool) -> Iterator[str | NDArray[np.integer]]:
    """Text, or tokens."""
    files = files_of(path, raw_tokens)
    if raw_tokens:
        if not path.stat().st_size or path.stat().st_size % RAW_DTYPE.itemsize:
            raise ValueError(f"--data {path}: {path.stat().st_size} bytes, which are no uint16 tokens")
        yield np.memmap(path, RAW_DTYPE, "r")
    elif len(files) == 2:
        yield from _of_indexed(files[0].with_suffix(""))
    elif path.name.endswith(JSONL):
        yield from _of_jsonl(path)
    else:
        yield _of_text_file(path)


def _of_text_file(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # line ends as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 text (byte {error.start})") from None


def _of_jsonl(path: Path) -> Iterator[str]:
    try:
        for batch in read_batches([str(path)]):
            for number, line in enumerate(batch.lines, batch.first_line):
                if line is None or line.strip():
                    try:
                        yield text_fields(line, ["text"])[0]
                    except ValueError as error:
                        raise ValueError(f"--data {path}:{number}: {error}") from None
    except DataError as error:
        raise ValueError(f"--data {error}") from None


def _of_indexed(prefix: Path) -> Iterator[NDArray[np.integer]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        with _suffixed(prefix, ".idx").open("rb") as file:
            if file.read(len(INDEX_MAGIC)) != INDEX_MAGIC:
                raise ValueError(f"its .idx does not begin with {INDEX_MAGIC!r}")
        dataset = IndexedDataset(str(prefix))
        for first, end in itertools.pairwise(dataset.document_indices.tolist()):
            if first < end:
                yield np.concatenate([dataset[i] for i in range(first, end)])
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--data {prefix}: not an indexed dataset of Megatron's ({error})") from None
