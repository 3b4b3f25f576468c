r"""Is an answer right? What a response answers, and whether that is what the data say: by math-verify, or as a letter.

The answer of a response is

1. looked for behind its last `</think>`, if it has one; a `<think>` that is not closed has no answer yet;
2. the content of the last whole `\boxed{...}`; where the only box is not closed, there is none;
3. without a box, what math-verify finds in the text: behind "final answer is", then behind "answer", else the last
   formula or number. For letters, see `letter`.

math-verify stops its own work by SIGALRM, which needs the main thread and cannot interrupt the arithmetic of a huge
power; so it works in a process of its own, which is ended when it takes too long. This file is that process's program
too, so it imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

SHOWN = 200
"""Characters of an answer that are kept to be shown."""
START_SECONDS = 120
MEMORY = 4 * 2**30
"""Bytes of address space of the process that computes; numbers can be written that fill any memory."""


@dataclass(frozen=True)
class Grade:
    """What a response answers, and whether it is right.

    Attributes:
        answer: As it is shown (at most 200 characters), or None if there is none.
        correct: Equal to what the data say.
        source: The text from which math-verify reads the answer again, for `Grader.equal`.
        failed: Grading took too long or broke down; such an answer counts as wrong.
    """

    answer: str | None
    correct: bool
    source: str | None = None
    failed: bool = False


def answered(response: str) -> str:
    """The response behind what its author only thought; empty while it still thinks."""
    _, closed, behind = response.rpartition("</think>")
    if closed:
        return behind
    return response.partition("<think>")[0]


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces balance.

    "" if only an unfinished one is there, None if there is no box at all.
    """
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return "" if starts else None


def letter(response: str) -> str | None:
    """The choice of a response, one of A to D; None if it has none.

    In this order: the box; the last "answer: B" (also "**Answer**: (B)"); the last "answer", "choice" or "option" that
    "is B"; "option B"; a last line of nothing but the letter. Outside a box a letter alone is a capital: "a" is a word.
    """
    text = answered(response)
    box = last_box(text)
    if box is not None:
        plain = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mathsf|bm|boldsymbol)\s*\{([^{}]*)\}", r"\1", box)
        plain = re.sub(r"\\[,;! ]|[\s$*{}~]", " ", plain).strip()
        named = r"(?:(?:the )?(?:correct )?(?:answer|choice|option)\s*(?:is)?\s*:?\s*)?"
        found = re.fullmatch(rf"(?i:{named})[(\[]?([A-Da-d])[)\]]?(?:[).:].*)?", plain, re.DOTALL)
        return found.group(1).upper() if found else None
    alone = r"[\s$*_(\[{]*(?:\\(?:text|mathrm|mathbf|textbf)\{)?[\s*(\[]*([A-D])(?![\w'’])"
    for pattern in (
        rf"(?i:answer)[\s*_]*:{alone}",
        # "The answer is A good one" names none.
        rf"(?i:answer|choice|option)\b[^.\n]{{0,60}}?\b(?:is|be)\b[\s*_:]*{alone}(?!(?<=A) \w)",
        rf"(?i:choice|option)[\s*_:]+{alone}",
    ):
        if letters := re.findall(pattern, text):
            return letters[-1]
    lines = text.strip().splitlines()
    single = re.fullmatch(r"[\s$*_(\[]*([A-D])[\s$*_)\].]*", lines[-1]) if lines else None
    return single.group(1) if single else None


def expression(response: str) -> str | None:
    r"""The part of a response that math-verify reads: `\boxed{...}`, or all that is answered; None if nothing is."""
    text = answered(response).strip()
    box = last_box(text)
    if box is not None:
        return f"\\boxed{{{box}}}" if box.strip() else None
    return text or None


class Grader:
    """Grades answers; any thread may call it. A context manager, because of the process it has.

    Args:
        seconds: For a comparison; math-verify has half of it for each of its steps, and the process is ended after
            all of it.
    """

    def __init__(self, seconds: float = 10) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def grade(self, response: str, gold: str, kind: str) -> Grade:
        r"""Compare the answer of a response with the one of the data.

        Args:
            gold: LaTeX without dollars, or a letter.
            kind: "math" for whatever math-verify understands, or "letter".
        """
        if kind == "letter":
            chosen = letter(response)
            return Grade(chosen, chosen == gold)
        source = expression(response)
        if source is None:
            return Grade(None, False)
        found = self._ask({"gold": f"\\boxed{{{gold}}}", "answer": source})
        if found is None:
            return Grade(source[-SHOWN:], False, source, failed=True)
        return Grade(found["answer"], found["equal"], source if found["answer"] is not None else None)

    def equal(self, first: Grade, second: Grade) -> bool:
        """Are two answers the same? math-verify's relation is not symmetric; either direction counts."""
        if first.source is None or second.source is None:
            return first.answer is not None and first.answer == second.answer
        if first.source == second.source:
            return True
        pair = (first.source, second.source)
        found = (self._ask({"gold": gold, "answer": answer}) for gold, answer in (pair, pair[::-1]))
        return any(one is not None and one["equal"] for one in found)

    def _ask(self, question: dict[str, str]) -> dict[str, Any] | None:
        """The process's reply, or None if it gives none in time: then the next question starts another process."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                return json.loads(self._line(self._seconds))
            except OSError:  # a TimeoutError is one
                self._stop()
                return None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # -P: the directory of this file is no place to import from.
            command = [sys.executable, "-P", __file__, str(max(1, int(self._seconds / 2)))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._read = b""
            try:
                self._line(START_SECONDS)
            except OSError as error:
                self._stop()
                raise ImportError("answers are graded by math-verify; install archscale-megatron[eval]") from error
        return self._process

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        file, end = self._process.stdout.fileno(), time.monotonic() + seconds
        waiting = select.poll()  # select() knows no file beyond 1,024, and process groups have hundreds each
        waiting.register(file, select.POLLIN)
        while b"\n" not in self._read:
            if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
                raise TimeoutError
            read = os.read(file, 65536)
            if not read:
                raise BrokenPipeError
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


@functools.lru_cache(maxsize=4096)
def _parsed(text: str, seconds: int) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=seconds)


def _compare(gold: str, answer: str, seconds: int) -> dict[str, Any]:
    from math_verify import verify

    expected, found = _parsed(gold, seconds), _parsed(answer, seconds)
    texts = [one for one in found if isinstance(one, str)] or [str(one) for one in found]
    shown = texts[-1].strip()[:SHOWN] if texts else None
    return {"answer": shown or None, "equal": bool(verify(expected, found, timeout_seconds=seconds))}


def _serve(seconds: int) -> None:
    """Answer each line of standard input by a line, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import logging

    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    _compare(r"\boxed{1}", r"\boxed{1}", seconds)  # what is imported and compiled at first use, no answer waits for
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            reply = _compare(question["gold"], question["answer"], seconds)
        except Exception:  # of a library that reads whatever a model writes
            reply = {"answer": question["answer"][-SHOWN:], "equal": False}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
