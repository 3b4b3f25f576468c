"""Lines of JSONL files, plain or compressed, in batches of bounded size."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import zstandard

BATCH_BYTES = 1 << 20
# A file without line ends (a JSON array, say) must not be read into memory whole.
MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 16


class DataError(Exception):
    """The input cannot be used; the message is one line for the user."""


@dataclass
class Batch:
    """Consecutive lines of one file. `lines` holds None for a line longer than MAX_LINE_BYTES."""

    path: str
    first_line: int
    lines: list[bytes | None] = field(default_factory=list)
    stored_bytes: int = 0
    """Bytes of the file, as stored, that were read for this batch."""


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that `patterns` (paths and globs) name: patterns in the order given, matches sorted.

    Raises DataError for a pattern that names no file.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise DataError(f"--input {pattern}: no such file; give .jsonl, .jsonl.gz or .jsonl.zst files, or a glob")
        paths += found
    return paths


def read_batches(paths: Iterable[str]) -> Iterator[Batch]:
    """Every line of `paths`, in order, in batches of about BATCH_BYTES.

    Raises DataError if a file cannot be read or a compressed one is damaged or cut short.
    """
    for path in paths:
        try:
            with open(path, "rb") as stored:
                yield from _batches(path, stored)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path}: {error}") from error


def text_fields(line: bytes | None, keys: Sequence[str]) -> list[str]:
    """The text under each of `keys` in one JSON line.

    Raises ValueError, saying why, if the line is no JSON object with a text under every key, or if a text is
    not Unicode (half of a surrogate pair), which no tokenizer takes.
    """
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB; one document a line is expected")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but a {type(record).__name__}")
    texts = []
    for key in keys:
        if key not in record:
            raise ValueError(f'no key "{key}"; the line has {", ".join(map(repr, record)) or "none"}')
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f'"{key}" is not text but {type(text).__name__}')
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f'"{key}" has half of a surrogate pair (character {error.start})') from error
        texts.append(text)
    return texts


def _batches(path: str, stored: BinaryIO) -> Iterator[Batch]:
    batch, size, before = Batch(path, 1), 0, 0
    for line in _lines(_blocks(path, stored)):
        batch.lines.append(line)
        size += len(line or b"")
        if size >= BATCH_BYTES:
            batch.stored_bytes = stored.tell() - before
            before = stored.tell()
            yield batch
            batch, size = Batch(path, batch.first_line + len(batch.lines)), 0
    batch.stored_bytes = stored.tell() - before
    yield batch


def _blocks(path: str, stored: BinaryIO) -> Iterator[bytes]:
    if path.endswith(".zst"):
        yield from _zstd_blocks(stored)
        return
    file = gzip.GzipFile(fileobj=stored) if path.endswith(".gz") else stored
    while block := file.read(_BLOCK_BYTES):
        yield block


def _zstd_blocks(stored: BinaryIO) -> Iterator[bytes]:
    # zstandard's stream_reader takes a file cut short for a complete one, so frames are followed here.
    frame = None
    while block := stored.read(_BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the zstd file is cut short")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their "\\n"; None for one that is too long, which is dropped as it is read."""
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        first, *rest = block.split(b"\n")
        for part in (first, *rest[:-1]) if rest else ():
            size += len(part)
            yield b"".join((*parts, part)) if size <= MAX_LINE_BYTES else None
            parts, size = [], 0
        last = rest[-1] if rest else first
        size += len(last)
        parts = [*parts, last] if size <= MAX_LINE_BYTES else []
    if size:
        yield b"".join(parts) if size <= MAX_LINE_BYTES else None
