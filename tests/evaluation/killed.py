"""Run `evaluation perplexity` and kill it with SIGKILL after so many windows, several times; then let it end.

    killed.py "0 3 7" ARGUMENTS

The model is a formula, and behind what each killed run wrote there is a torn line. Prints how many were killed, and how
many tokens the last run scored, in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from archscale_megatron.evaluation import options, perplexity
from tests.evaluation.commands import run
from tests.evaluation.engines import KnownEngine
from tests.evaluation.test_texts import byte_tokenizer


def loss(token: int, context: int) -> float:
    return token + 1 / context


class Mortal(KnownEngine):
    """Of which the process is killed when it is to give results of one more window than `left`."""

    left = -1

    def score(self, *arguments: Any) -> Any:
        for result in super().score(*arguments):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            yield result


def main() -> None:
    kills, *arguments = sys.argv[1:]
    engine = Mortal(loss, byte_tokenizer())
    options.open_engine = lambda args: engine
    codes = []
    for kill in map(int, kills.split()):
        child = os.fork()
        if not child:
            engine.left = kill
            run(perplexity, *arguments)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        (journal,) = Path(arguments[arguments.index("--output") + 1]).glob("*.jsonl")
        with journal.open("ab") as file:
            file.write(b'["16/0/0-1')
    run(perplexity, *arguments)
    print(json.dumps({"kills": codes.count(-signal.SIGKILL), "last": engine.asked}))


if __name__ == "__main__":
    main()
