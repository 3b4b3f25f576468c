"""Time and memory of scoring 1,000 continuations through lm-eval, with our model and with lm-eval's own `hf`.

    python benchmarks/evaluation.py [--rounds 7] [--items 1000]

Prints a markdown table. The model is the demo's, with random weights, in fp32; its tokenizer is trained on Python's
standard library, and so are the items made. Each way is a process of its own, with the model loaded; they take turns,
and what is shown are the median of the times and the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
WAYS = {"hf, batch 1": 1, "hf, batch 8": 8, "hf, batch 64": 64, "hf, auto": "auto", "archscale": "auto"}
"""Name -> its batch size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.items)
        workers = {name: Worker(name, folder) for name in WAYS}
        print("| items | way | s | times ours | peak memory above the model's, MiB | largest difference |")
        print("|---|---|---|---|---|---|")
        for kind in ("multiple choice", "last word"):
            rounds = [{name: worker.run(kind) for name, worker in workers.items()} for _ in range(args.rounds + 1)]
            expected = rounds[0]["hf, batch 1"]["answers"]
            for name in WAYS:
                taken = [one[name]["seconds"] for one in rounds[1:]]  # the first is to warm up
                ratios = [one[name]["seconds"] / one["archscale"]["seconds"] for one in rounds[1:]]
                memory = max(one[name]["memory"] for one in rounds) / 2**20
                pairs = zip(rounds[0][name]["answers"], expected, strict=True)
                difference = max(abs(got - wanted) for got, wanted in pairs)
                print(
                    f"| {kind} | {name} | {statistics.median(taken):.2f} | {statistics.median(ratios):.1f} | "
                    f"{memory:.0f} | {difference:.1e} |",
                    flush=True,
                )
        for worker in workers.values():
            worker.process.stdin.close()


def prepare(folder: Path, count: int) -> None:
    """folder/run, its export folder/export, and folder/items.json."""
    import demo
    import torch

    from archscale_megatron import single_process
    from archscale_megatron.archs.build import build_architecture
    from archscale_megatron.checkpoint.tensors import write_release
    from archscale_megatron.hf import archscale
    from archscale_megatron.hf.export import export

    texts = demo.write_corpus(folder / "corpus.jsonl")
    demo.train_tokenizer(texts[::4], folder / "tokenizer")
    (folder / "items.json").write_text(json.dumps(items(texts, count)))
    options = {name[2:].replace("-", "_"): value for name, value in _pairs(demo.MODEL.split())}
    length = int(options.pop("seq_length"))
    family, depth = options.pop("train_model"), int(options.pop("depth"))
    arch = build_architecture(
        family, depth, vocab_size=demo.VOCABULARY, context_length=length, tied_embeddings=True,
        **{name: int(value) for name, value in options.items()},
    )  # fmt: skip
    single_process.prepare()
    torch.manual_seed(0)
    shapes = {name: shape for one in archscale.maps(arch) for name, shape in one.megatron_shapes().items()}
    tensors = (
        (name, torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.05) for name, shape in shapes.items()
    )
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(folder / "tokenizer.model")}
    run = {"format": 1, "tokenizer": tokenizer, "options": {"max_position_embeddings": length}}
    write_release(folder / "run", arch, tensors, run)
    export(folder / "run", folder / "export")


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def items(texts: list[str], count: int) -> dict[str, list[tuple[str, str]]]:
    """Contexts and continuations: four choices of a line behind three, and the last word of four lines."""
    lines = [line for text in texts for line in text.splitlines() if 20 < len(line) < 80]
    step = len(lines) // count - 8
    choices, words = [], []
    for i in range(count):
        at = i * step
        words.append(tuple("\n".join(lines[at : at + 4]).rstrip().rpartition(" ")[::2]))
        if i < count // 4:
            context = "\n".join(lines[at : at + 3]) + "\n"
            choices += [(context, lines[at + 3 + 2 * choice]) for choice in range(4)]
    return {"multiple choice": choices, "last word": [(context, f" {word}") for context, word in words]}


class Worker:
    """A process that scores the items when told to."""

    def __init__(self, name: str, folder: str) -> None:
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # Megatron's checkpoint writer set them here
        environment = {key: value for key, value in os.environ.items() if key not in launched}
        self.process: Any = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.answer()  # loaded; transformers copies an export's code, which two processes must not do at once

    def run(self, kind: str) -> dict[str, Any]:
        """Score the items of `kind`."""
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a worker ended with {self.process.wait()}")


def work(name: str, folder: str) -> None:
    """Load a model, and score what is named on standard input."""
    import torch
    from lm_eval.api.instance import Instance

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model: Any
    if name == "archscale":
        from archscale_megatron.evaluation.lm_eval_model import ArchScaleLM

        model = ArchScaleLM(str(Path(folder, "run")), batch_size=WAYS[name], device="cpu")
    else:
        from lm_eval.models.huggingface import HFLM

        export = str(Path(folder, "export"))
        model = HFLM(export, batch_size=WAYS[name], device="cpu", trust_remote_code=True)
    found = json.loads(Path(folder, "items.json").read_text())
    print("{}", flush=True)
    for line in sys.stdin:
        requests = [
            Instance("loglikelihood", {}, (context, continuation), i)
            for i, (context, continuation) in enumerate(found[line.strip()])
        ]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of what follows
        before = memory("VmRSS")
        start = time.perf_counter()
        answers = model.loglikelihood(requests)
        seconds = time.perf_counter() - start
        taken = {"seconds": seconds, "memory": memory("VmHWM") - before, "answers": [logprob for logprob, _ in answers]}
        print(json.dumps(taken), flush=True)


def memory(name: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
