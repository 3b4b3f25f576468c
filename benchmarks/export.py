"""Time of an export to Hugging Face, against writing the same bytes with safetensors.

    python benchmarks/export.py [--runs 10] [--directory .]

Prints a markdown table. The model is that of benchmarks/checkpoint.py, random, fp32, in a checkpoint of one process. An
export verifies the checkpoint's digests, reads and converts its tensors, and writes and fsyncs one shard; what it is
compared with has the tensors in memory. Both take turns. Each deletes what it wrote the turn before, and finds free
memory that was touched just before: virtual machines may give untouched memory away, and take long to bring it back.
The checkpoint was just written and comes from the page cache.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def settle(size: int) -> None:
    """Wait until the disk is idle, and touch `size` bytes of free memory."""
    import torch

    os.sync()
    torch.ones(size, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--directory", default=".", help="on the disk that is measured")
    args = parser.parse_args()

    from archscale_megatron import single_process

    single_process.prepare()

    import torch
    from checkpoint import ASPECT_RATIO, DEPTH, FAMILY, LENGTH, VOCABULARY
    from safetensors.torch import load_file, save_file

    from archscale_megatron.archs.build import build_architecture
    from archscale_megatron.checkpoint.tensors import write_release
    from archscale_megatron.hf import archscale
    from archscale_megatron.hf.export import export

    arch = build_architecture(
        FAMILY, DEPTH, aspect_ratio=ASPECT_RATIO, vocab_size=VOCABULARY, context_length=LENGTH, tied_embeddings=True
    )
    shapes = {name: shape for one in archscale.maps(arch) for name, shape in one.megatron_shapes().items()}
    times: dict[str, list[float]] = {"safetensors + fsync": [], "export": []}
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        run, exported, plain = (Path(folder, name) for name in ("run", "exported", "plain.safetensors"))
        tensors = ((name, torch.randn(shape)) for name, shape in shapes.items())
        write_release(run, arch, tensors, {"tokenizer": {"type": "NullTokenizer", "model": None}})
        export(run, exported, format="archscale")
        state = {name: tensor.clone() for name, tensor in load_file(exported / "model.safetensors").items()}
        size = (exported / "model.safetensors").stat().st_size
        for _ in range(args.runs):
            plain.unlink(missing_ok=True)
            settle(4 * size)
            start = time.perf_counter()
            save_file(state, plain)
            with plain.open("rb") as file:
                os.fsync(file.fileno())
            times["safetensors + fsync"].append(time.perf_counter() - start)
            shutil.rmtree(exported, ignore_errors=True)
            settle(4 * size)
            start = time.perf_counter()
            export(run, exported, format="archscale")
            times["export"].append(time.perf_counter() - start)
    base = times["safetensors + fsync"]
    print(f"{size:,} bytes, {args.runs} runs, {torch.get_num_threads()} threads")
    print("\n| | median s | fastest to slowest | MB/s | ratio |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds, base, strict=True))
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"| {name} | {median:.2f} | {spread} | {size / median / 1e6:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
