"""gigatoken as the fast path of a Hugging Face byte-level BPE tokenizer, held to the ids of `tokenizers`.

Against `tokenizers` 0.22.2, gigatoken 0.10.0 was found to differ in three things only:
- characters whose category changed from Unicode 16 to 17 (it has 17's tables): documents with one are
  given to `tokenizers`;
- added tokens that match whole words only, or after normalisation: such a tokenizer is not taken;
- SentencePiece-style BPE: not taken either.
What is not known yet is caught by odd texts at the start and by a sample of the documents (`check`).
"""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archscale_megatron.data.tokenization import HuggingFaceTokenizer, Ids, flatten

# Code points whose general category differs between UnicodeData 16.0 and 17.0: 4803 new ones, and U+0295.
_UNICODE_17 = (
    "295 88f c5c cdc 1acf-1add 1ae0-1aeb 20c1 2b96 a7ce-a7cf a7d2 a7d4 a7f1 fbc3-fbd2 fd90-fd91 fdc8-fdce "
    "10940-10959 10ec5-10ec7 10ed0-10ed8 10efa-10efb 11b60-11b67 11db0-11ddb 11de0-11de9 16ea0-16eb8 "
    "16ebb-16ed3 16ff2-16ff6 187f8-187ff 18d09-18d1e 18d80-18df2 1ccfa-1ccfc 1ceba-1ced0 1cee0-1cef0 "
    "1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f6d8 1f777-1f77a 1f8d0-1f8d8 1fa54-1fa57 1fa8a 1fa8e 1fac8 "
    "1facd 1faea 1faef 1fbfa 2b73a-2b73f 2cea2-2cead 323b0-33479"
)
# gigatoken's cache of words never shrinks (8 bytes a byte of random text): renewed when grown by this.
_CACHE_BYTES = 384 << 20
# Longer documents are not sampled: `tokenizers` can take a time that grows with the square of a run of spaces.
_CHECK_CHARACTERS = 1 << 16

ODD_TEXTS = (
    *("", "\0", "a\0b", "\r\n", "a\r\nb\rc", " \n \t\n", "\u00a0\u3000 \u2028\u0085x", "  two   three\t\ttabs   "),
    *("it's I'LL we've 'S '\u017f", "\u00e9 e\u0301 \ufb01 \u212a \u01c5 \u00b2\u2177", "123456789 \u0661\u0662\u0663"),
    *("\u65e5\u672c\u8a9e\u3001", "\U0001f600 \U0001f469\u200d\U0001f466\ufe0f", "\ufeff\u200b\u202e\ufffe\U0010ffff"),
    *("<s></s><|endoftext|><|im_start|>", "x" * 3000, " " * 3000, "ab1 " * 1000),
)


class NotExactError(Exception):
    """gigatoken's ids are, or may be, other than the reference's."""


class GigatokenTokenizer:
    """The ids of `reference`, from gigatoken. Raises NotExactError from here on if they are not the same."""

    backend = "gigatoken"

    def __init__(self, reference: HuggingFaceTokenizer) -> None:
        self.vocab_size, self.eod = reference.vocab_size, reference.eod
        self._reference = reference
        self._floor = resident_bytes()
        self._lock = threading.Lock()
        added = reference.tokenizer.get_added_tokens_decoder().values()
        normalizer = reference.tokenizer.normalizer is not None
        for token in added:
            if token.single_word or (token.normalized and normalizer):
                raise NotExactError(f"it matches the added token {token.content!r} in other places")
        try:
            from gigatoken import Tokenizer
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError as error:
            raise NotExactError(f"it cannot be imported ({error})") from error
        self._load: Callable[[], Any] = lambda: Tokenizer.from_json(reference.tokenizer.to_str())
        try:
            self._fast = self._load()
        except Exception as error:  # a Rust error of no common class
            raise NotExactError(f"it does not take this tokenizer ({str(error).partition(chr(10))[0]})") from error
        if not isinstance(self._fast.backend, BPETokenizer):
            raise NotExactError("the tokenizer is no byte-level BPE")
        self._unsure = _code_points(_UNICODE_17)
        self._prefix, self._suffix = self._surroundings()
        contents = [token.content for token in itertools.islice(added, 256)]
        odd = [
            *ODD_TEXTS,
            *contents,
            *(f"a{token}b {token} \n{token}{token}" for token in contents),
            "".join(contents),
        ]
        for text in odd:
            self.check(text, self.encode([text])[0])

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        rows = self._fast.encode_batch(list(texts), parallel=False).layout
        ids, offsets = np.asarray(rows.content.data), np.asarray(rows.offsets)
        self._bound_cache()
        unsure = [i for i, text in enumerate(texts) if not text.isascii() and self._has_unsure(text)]
        if not unsure and not len(self._prefix) and not len(self._suffix):
            return ids, np.diff(offsets)
        documents = [
            np.concatenate([self._prefix, ids[start:end], self._suffix]) for start, end in itertools.pairwise(offsets)
        ]
        for i in unsure:
            documents[i] = self._reference.encode([texts[i]])[0]
        return flatten(documents)

    def check(self, text: str, ids: Ids) -> None:
        if len(text) <= _CHECK_CHARACTERS and not np.array_equal(self._reference.encode([text])[0], ids):
            raise NotExactError(f"its ids differ from those of tokenizers for the text {text[:60]!r}")

    def _has_unsure(self, text: str) -> bool:
        return bool(self._unsure[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())

    def _surroundings(self) -> tuple[Ids, Ids]:
        """The ids that the post-processor puts before and after every text."""
        bare = self._reference.tokenizer.encode("a", add_special_tokens=False).ids
        full = self._reference.tokenizer.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return np.array(full[:start], np.int32), np.array(full[start + len(bare) :], np.int32)
        raise NotExactError("the tokenizer's post-processor does more than add tokens around the text")

    def _bound_cache(self) -> None:
        resident = resident_bytes()
        self._floor = min(self._floor, resident)
        if resident > self._floor + _CACHE_BYTES and self._lock.acquire(blocking=False):
            self._fast = self._load()
            self._floor = resident  # falls once the last thread lets the old one go
            self._lock.release()


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _code_points(ranges: str) -> NDArray[np.bool_]:
    """True at the code points of "295 1acf-1add": [0x110000]."""
    table = np.zeros(0x110000, np.bool_)
    for item in ranges.split():
        first, _, last = item.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table
