"""Tokens/s of tools/preprocess_data.py beside Megatron-LM's own, same text, same tokenizer, runs interleaved.

    git clone https://github.com/NVIDIA/Megatron-LM
    python benchmarks/preprocess.py --megatron-lm Megatron-LM

The corpus is this machine's Python: the standard library and site-packages, deduplicated by hash. Times are wall
times of whole processes, imports included.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator

import psutil

ROOT = pathlib.Path(__file__).resolve().parents[1]


def python_files(limit: int) -> Iterator[str]:
    """Texts of distinct Python files, `limit` bytes in all."""
    seen = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(pathlib.Path(root).rglob("*.py")):
            data = path.read_bytes()
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            if (digest := hashlib.sha256(data).digest()) not in seen:
                seen.add(digest)
                limit -= len(data)
                yield text
            if limit < 0:
                return


def make_corpus(path: pathlib.Path, limit: int) -> list[str]:
    texts = list(python_files(limit))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"corpus: {len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes of text")
    return texts


def train_tokenizers(texts: list[str], work: pathlib.Path) -> dict[str, str]:
    """32k byte-level BPE with GPT-2's split, and 32k SentencePiece BPE, on an eighth of the documents."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator(texts[::8], trainer)
    (work / "hf").mkdir()
    hf.save(str(work / "hf" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (work / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts[::8] for line in text.split("\n") if line),
        model_prefix=str(work / "sp"),
        vocab_size=32000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return {"HuggingFaceTokenizer": str(work / "hf"), "SentencePieceTokenizer": str(work / "sp.model")}


def measure(command: list[str], log: pathlib.Path) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, peak of the sum of resident bytes) of the process tree."""
    peak, start, before = 0, time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as process:
        while process.poll() is None:
            total = 0
            for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                try:
                    total += member.memory_info().rss
                except psutil.Error:
                    continue  # it ended meanwhile
            peak = max(peak, total)
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    return wall, processor, peak


def digests(prefix: pathlib.Path) -> list[str]:
    files = (f"{prefix}_text_document.bin", f"{prefix}_text_document.idx")
    return [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", required=True, help="a checkout of NVIDIA/Megatron-LM")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=57_000_000, help="size of the corpus")
    args = parser.parse_args()
    packages = ("megatron-core", "tokenizers", "gigatoken", "sentencepiece", "transformers", "torch")
    print(f"python {platform.python_version()}, {os.cpu_count()} cores,", end=" ")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    tools = {
        "Megatron-LM": os.path.join(args.megatron_lm, "tools", "preprocess_data.py"),
        "ours": str(ROOT / "tools" / "preprocess_data.py"),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        tokenizers = train_tokenizers(make_corpus(work / "corpus.jsonl", args.bytes), work)
        print("| tokenizer | tool | wall s, median (runs) | Mtok/s | ratio | CPU s, median | peak RSS MiB |")
        print("|---|---|---|---|---|---|---|")
        for kind, model in tokenizers.items():
            results: dict[str, list[tuple[float, float, int]]] = {tool: [] for tool in tools}
            for run, tool in itertools.product(range(args.runs), tools):
                command = [sys.executable, tools[tool], "--input", str(work / "corpus.jsonl"), "--append-eod"]
                command += ["--tokenizer-type", kind, "--tokenizer-model", model, "--workers", str(args.workers)]
                command += ["--output-prefix", str(work / f"{tool}{run}{kind}")]
                results[tool].append(measure(command, work / "log"))
                print(kind, tool, *results[tool][-1], file=sys.stderr, flush=True)
            same = digests(work / f"ours0{kind}") == digests(work / f"Megatron-LM0{kind}")
            index = (work / f"ours0{kind}_text_document.idx").read_bytes()
            itemsize = {8: 2, 4: 4}[index[17]]
            tokens = os.path.getsize(work / f"ours0{kind}_text_document.bin") / itemsize
            walls = {tool: statistics.median(wall for wall, _, _ in runs) for tool, runs in results.items()}
            for tool, runs in results.items():
                listed = " ".join(f"{wall:.2f}" for wall, _, _ in runs)
                memory = max(peak for _, _, peak in runs) / 2**20
                ratio = walls["Megatron-LM"] / walls[tool]
                processor = statistics.median(seconds for _, seconds, _ in runs)
                print(f"| {kind} | {tool} | {walls[tool]:.2f} ({listed}) | {tokens / walls[tool] / 1e6:.2f} |", end=" ")
                print(f"{ratio:.1f}x | {processor:.1f} | {memory:.0f} |")
            print(f"{kind}: {tokens:,.0f} tokens, sha256 of .bin and .idx {'equal' if same else 'DIFFER'}", flush=True)


if __name__ == "__main__":
    main()
