"""A training script that trains nothing: what it does is said by --seed.

1 to 99: logs a loss that depends on the learning rate and ends; 100: fails; 101: hangs, with a child in a session of
its own; 102: its loss becomes NaN; 103: ends early without an error; 104: says of a NaN and fails. It appends a line
to `starts` beside the points whenever it starts.
"""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

ITERATIONS, BATCH = 20, 8


def value(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


def loss(rate: float, iteration: int) -> float:
    return 3 + math.log2(rate / 4e-3) ** 2 + 1 / iteration


def main() -> None:
    tensorboard, behaviour, rate = Path(value("--tensorboard-dir")), int(value("--seed")), float(value("--lr"))
    with (tensorboard.parent.parent / "starts").open("a") as file:
        file.write(f"{tensorboard.parent.name} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    print("training")
    if behaviour == 100:
        raise RuntimeError("a planted failure")
    if behaviour == 104:
        print("ERROR: unexpected result nan (message='NaN in the loss of a micro-batch')")
        sys.exit(16)
    writer = EventFileWriter(str(tensorboard))

    def log(tag: str, number: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=number)])
        writer.add_event(Event(summary=summary, step=step, wall_time=time.time()))

    for iteration in range(1, 6 if behaviour == 103 else ITERATIONS + 1):
        number = math.nan if behaviour == 102 and iteration > 10 else loss(rate, iteration)
        log("lm loss", number, iteration)
        log("lm loss vs samples", number, iteration * BATCH)
    log("lm loss validation", loss(rate, ITERATIONS) + 0.5, ITERATIONS)
    writer.close()
    if behaviour == 101:
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        (tensorboard.parent / "child").write_text(str(child.pid))
        time.sleep(300)


if __name__ == "__main__":
    main()
