"""From text to a trained SambaY on this machine, without a download: what `make demo` runs.

The corpus is Python's own standard library. A small SambaY trains on 4 processes (tensor parallel 2 x pipeline
parallel 2, with sequence parallelism), stops, goes on as 2 data-parallel processes from the same checkpoint,
writes some Python, and is exported to Hugging Face. Exits with 1 if the model has not learnt.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from loss_curve import Curve, draw, mean
from numpy.typing import NDArray
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
MARKER = "made-by-demo"  # only a directory that holds this file is ever cleared

VOCABULARY = 2048
BATCH = 16  # sequences an iteration
STOP, END = 132, 220  # the iteration at which the layout changes, and the last one
PROMPT = "def read_file(path):\n"
LEARNT = 0.8  # the loss must end below this share of the unigram entropy
CONTINUES = 0.1  # how far, relatively, the losses just before and after the resume may lie apart
# As anybody would who has only the exported folder: the model's code lies beside its weights.
PLAIN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
ids = model.generate(
    **tokenizer(prompt, return_tensors="pt"), max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9
)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3"}

MODEL = "--train-model sambay --depth 8 --aspect-ratio 16 --head-dim 16 --local-window 64 --seq-length 256"
RECIPE = (
    f"--micro-batch-size 8 --global-batch-size {BATCH} --train-iters {END} --lr 3e-3 --min-lr 3e-4 "
    "--lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 "
    "--use-distributed-optimizer --split 98,2,0 --eval-interval 44 --eval-iters 5 --save-interval 1000 "
    "--log-interval 1 --tensorboard-log-interval 1 --seed 1234"
)
PARALLEL = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"


class DemoError(Exception):
    """A step failed; the message says why."""


class Steps:
    """Headings with the time that has passed, and at the end what each step took."""

    def __init__(self, count: int) -> None:
        self.count, self.start = count, time.monotonic()
        self.times: list[tuple[str, float]] = []

    def next(self, title: str) -> None:
        now = time.monotonic() - self.start
        self.times.append((title, now))
        say(f"\n[{len(self.times)}/{self.count}] {title}  ({clock(now)})")

    def table(self) -> str:
        ends = [*(start for _, start in self.times[1:]), time.monotonic() - self.start]
        rows = [f"  {clock(end - start):>6}  {title}" for (title, start), end in zip(self.times, ends, strict=True)]
        return "\n".join([*rows, f"  {clock(ends[-1]):>6}  in all"])


def say(text: str) -> None:
    print(text, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def fresh_directory(directory: Path) -> None:
    """Make `directory`, without what an earlier demo left there; anything else there is not touched."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise DemoError(f"--output {directory}: holds files that are not a demo's; give another directory")
        say(f"starting afresh: removing the earlier demo in {os.path.relpath(directory)}")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()


def source_files(library: Path) -> list[Path]:
    """The Python files below `library` in one order everywhere, without tests and installed packages."""
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    return [library / path for path in sorted(files) if not SKIPPED & set(path.parts)]


def write_corpus(path: Path) -> list[str]:
    """The standard library as JSONL, one file a line; returns the texts."""
    texts = [file.read_text("utf-8", "replace") for file in source_files(Path(sysconfig.get_path("stdlib")))]
    texts = [text for text in texts if text]
    if not texts:
        raise DemoError("this Python has no source files of its standard library to train on; use another Python")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return texts


def train_tokenizer(texts: Iterable[str], prefix: Path) -> None:
    """A SentencePiece BPE model in `prefix`.model that gives every text back as it was."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(prefix),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation is one token
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )


def unigram_entropy(tokens: NDArray[np.integer]) -> float:
    """Nats per token: -sum p log p over the frequencies p of the ids [n]. No model that ignores the context of a
    token can have a lower loss."""
    counts = np.unique(tokens, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def run_logged(command: Sequence[str], log: Path, curve: Curve, start: int, stop: int) -> None:
    """Run a training command with its output in `log`, and a bar for iterations start..stop."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    interval = 0.2 if sys.stderr.isatty() else 30
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        tqdm(total=stop - start, desc="  starting", unit="it", mininterval=interval, smoothing=0.05) as bar,
    ):
        file.write(shlex.join(command) + "\n")
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if curve.read(line):
                    if len(curve.iterations) == 1:
                        bar.reset()  # the start of the processes says nothing about the time that is left
                    bar.set_description_str("  training", refresh=False)
                    bar.set_postfix_str(f"loss {curve.losses[-1]:.3f}", refresh=False)
                    bar.update()
        except BaseException:  # Ctrl-C: leave no training behind
            process.terminate()
            raise
    if process.returncode:
        tail = "".join(f"  | {line}\n" for line in last_words(log.read_text("utf-8").splitlines()))
        raise DemoError(
            f"training ended with exit code {process.returncode}; the end of {os.path.relpath(log)}:\n{tail}"
        )
    if not curve.iterations or curve.iterations[-1] != stop:
        raise DemoError(f"training did not reach iteration {stop}; see {os.path.relpath(log)}")


def last_words(lines: Sequence[str], count: int = 20) -> list[str]:
    """The last lines before torchrun's own report of the failure, which is long and says less."""
    end = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    return list(lines[max(0, end - count) : end])


def train(output: Path, name: str, processes: int, options: Sequence[str], start: int, stop: int) -> Curve:
    """Iterations start..stop of the one training run, in the layout that `options` say."""
    curve, log = Curve(), output / f"{name}.log"
    say(f"  {processes} processes; Megatron's log: {os.path.relpath(log)}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    files = {
        "--data-path": "corpus_text_document",
        "--tokenizer-model": "tokenizer.model",
        "--save": "checkpoints",
        "--tensorboard-dir": "tensorboard",
    }
    common = f"{MODEL} {RECIPE} --vocab-size {VOCABULARY} --tokenizer-type SentencePieceTokenizer"
    paths = [word for option, file in files.items() for word in (option, str(output / file))]
    command = [*launch, str(ROOT / "pretrain_archscale.py"), *common.split(), *paths, *options]
    run_logged(command, log, curve, start, stop)
    say(f"  loss {mean(curve.losses[:10]):.3f} -> {mean(curve.losses[-10:]):.3f} (means of 10 iterations)")
    say("  validation loss " + ", ".join(f"{loss:.3f} at {i}" for i, loss in sorted(curve.validation.items())))
    return curve


def check_continues(before: Curve, after: Curve) -> str:
    """What shows that `after` is the same run as `before`; raises DemoError if it is not."""
    if after.iterations[0] != before.iterations[-1] + 1 or after.samples[0] != before.samples[-1] + BATCH:
        raise DemoError(
            f"the resumed run began at iteration {after.iterations[0]} ({after.samples[0]} samples); "
            f"it should follow {before.iterations[-1]} ({before.samples[-1]} samples)"
        )
    old, new = mean(before.losses[-10:]), mean(after.losses[:10])
    text = f"loss {old:.3f} in the last 10 iterations before, {new:.3f} in the first 10 after"
    if abs(new - old) > CONTINUES * old:
        raise DemoError(f"the curve breaks: {text}")
    return f"{text}; consumed samples {before.samples[-1]:,} -> {after.samples[0]:,}"


def run_plain(command: Sequence[str]) -> None:
    """Run a command whose output is for the user."""
    sys.stdout.flush()
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise DemoError(f"{shlex.join(command)} ended with exit code {code}")


def prepare(output: Path, steps: Steps) -> float:
    """The first three steps: the corpus, its tokenizer and the dataset in `output`; returns its unigram entropy."""
    steps.next("Corpus: the standard library of this Python")
    texts = write_corpus(output / "corpus.jsonl")
    say(f"  {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters")

    steps.next(f"Tokenizer: SentencePiece BPE, {VOCABULARY} pieces")
    train_tokenizer(texts, output / "tokenizer")

    steps.next("Indexed dataset: tools/preprocess_data.py")
    data = ["--input", str(output / "corpus.jsonl"), "--output-prefix", str(output / "corpus"), "--append-eod"]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(output / "tokenizer.model")]
    run_plain([sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *data, *tokenizer])
    entropy = unigram_entropy(np.fromfile(output / "corpus_text_document.bin", np.uint16))
    say(f"  unigram entropy {entropy:.3f} nats per token")
    return entropy


def demo(output: Path) -> None:
    """All steps; raises DemoError."""
    steps = Steps(8)
    fresh_directory(output)

    entropy = prepare(output, steps)

    steps.next("Train: tensor parallel 2 x pipeline parallel 2, sequence parallel")
    before = train(output, "train", 4, [*PARALLEL.split(), "--exit-interval", str(STOP)], 0, STOP)

    steps.next("Resume the checkpoint in another layout: pipeline parallel 1 x data parallel 2")
    after = train(output, "resume", 2, ["--load", str(output / "checkpoints")], STOP, END)
    say(f"  the curve continues: {check_continues(before, after)}")

    steps.next("Loss curve and logs")
    draw(before, after, entropy, output / "loss.png")
    say(f"  {os.path.relpath(output / 'loss.png')}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    say(f"  TensorBoard: {os.path.relpath(tensorboard)} --logdir {os.path.relpath(output / 'tensorboard')}")

    steps.next("Sample: archscale_megatron.generate")
    sampling = ["--prompt", PROMPT, "--max-new-tokens", "150", "--temperature", "0.7", "--top-p", "0.9"]
    generate = [sys.executable, "-m", "archscale_megatron.generate", "--load", str(output / "checkpoints")]
    run_plain([*generate, *sampling])

    steps.next("Export to Hugging Face, and a sample from plain transformers")
    hf = [sys.executable, "-m", "archscale_megatron.hf", "export", "--load", str(output / "checkpoints")]
    run_plain([*hf, "--output", str(output / "huggingface")])
    run_plain([sys.executable, "-c", PLAIN_TRANSFORMERS, str(output / "huggingface"), PROMPT])

    loss = mean(after.losses[-10:])
    say(f"\n{steps.table()}")
    validation = after.validation[END]
    say(f"\nfinal loss       {loss:.3f} nats per token, the mean of 10 iterations (validation {validation:.3f})")
    say(f"unigram entropy  {entropy:.3f} nats per token of the corpus; the loss is {loss / entropy:.2f} of it")
    if loss >= LEARNT * entropy:
        raise DemoError(f"the loss should end below {LEARNT} of the unigram entropy, {LEARNT * entropy:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="where all files go (runs/demo)")
    parser.add_argument("--data-only", action="store_true", help="stop when the text is a dataset (3 of the 8 steps)")
    args = parser.parse_args()
    output = args.output.resolve()
    try:
        if args.data_only:
            fresh_directory(output)
            prepare(output, Steps(3))
        else:
            demo(output)
    except DemoError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
