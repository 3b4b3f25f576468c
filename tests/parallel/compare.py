"""Run models in parallel layouts and print how far each is from its single-process run.

python -m tests.parallel.compare [MODEL or LAYOUT ...]: a Markdown table, rows models, columns layouts, cells the
largest relative difference of any loss, gradient or updated parameter. The first column is what moving each initial
weight by up to its last bit does to the single-process run itself, the most of all draws (see `run_all`). Exit code 1
if a cell is larger than its tolerance.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tests.launch import torchrun
from tests.parallel.layouts import (
    DRAWS,
    EVERYTHING,
    EXPERTS,
    LAYOUTS,
    MODELS,
    REFERENCES,
    ROUNDED,
    RUNS,
    reference_of,
    with_references,
)

TOLERANCE = 1e-5
# bf16 rounds every product of a sum that tensor parallelism cuts in two, and every gradient that crosses a stage.
TOLERANCE_BF16 = 6e-2


def run_all(directory: Path, cases: list[tuple[str, str]]) -> Iterator[int]:
    """Train every model and layout of `cases`, and their references, a launch a world size; results go to `directory`.

    Of roundings there is one draw; all of `DRAWS` only for the references of what exceeds the tolerance by that one.
    Yields the number of runs after each launch.
    """
    yield from _launch(directory, with_references(cases))
    exceeding = [c for c in cases if not max(differences(directory, *c).values()) <= tolerance(directory, *c)]
    more = {(model, reference_of(LAYOUTS[name])) for model, name in exceeding if not LAYOUTS[name].bf16}
    list(_launch(directory, [(model, f"{name}_rounded{seed}") for model, name in sorted(more) for seed in DRAWS[1:]]))


def _launch(directory: Path, runs: list[tuple[str, str]]) -> Iterator[int]:
    layouts = LAYOUTS | REFERENCES | ROUNDED
    (directory / RUNS).write_text(json.dumps(runs))
    for size in sorted({layouts[name].world_size for _, name in runs}):
        torchrun(size, "-m", "tests.parallel.worker", str(directory), timeout=3600)
        yield sum(layouts[name].world_size == size for _, name in runs)


def tolerance(directory: Path, model: str, name: str) -> float:
    """What a run may differ by: 1e-5, or 6e-2 in bf16; where roundings alone do more than that, twice what they do.

    A gated delta net multiplies roundings by about 50, other models by about 10 (tests/model/test_reference.py).
    """
    rounding, allowed = rounding_of(directory, model, name), TOLERANCE_BF16 if LAYOUTS[name].bf16 else TOLERANCE
    return allowed if rounding <= allowed else 2 * rounding


def rounding_of(directory: Path, model: str, name: str) -> float:
    """What moving each initial weight by up to its last bit does to the single-process run that `name` is compared
    with, the most of the draws that were made; of a bf16 run, what bf16 itself does."""
    reference = reference_of(LAYOUTS[name])
    draws = [f"{reference}_rounded{seed}" for seed in DRAWS]
    pairs = [(draw, reference) for draw in draws if (directory / f"{model}.{draw}.safetensors").exists()]
    if LAYOUTS[name].bf16:
        pairs = [(reference, "single")]
    return max(max(_differences(directory, model, *pair).values()) for pair in pairs)


def differences(directory: Path, model: str, name: str) -> dict[str, float]:
    """For every tensor of a run, max |a - b| / max |b| against the single-process run b.

    In bf16 the second is of the layer's largest tensor: some gradients, such as those of lambdas and of the norms of
    queries, are sums that all but cancel, of which rounding leaves nothing. And of experts only the losses count: a
    rounded token chooses another expert, whose gradient is then another.
    """
    return _differences(directory, model, name, reference_of(LAYOUTS[name]))


def _differences(directory: Path, model: str, name: str, reference: str) -> dict[str, float]:
    layout = (LAYOUTS | REFERENCES | ROUNDED)[name]
    run = load_file(directory / f"{model}.{name}.safetensors")
    expected = load_file(directory / f"{model}.{reference}.safetensors")
    assert run.keys() == expected.keys(), f"{name}: other tensors than the single-process run"
    if layout.bf16 and model in EXPERTS:
        expected = {key: b for key, b in expected.items() if key.startswith("loss")}
    scales = {key: b.abs().max().item() for key, b in expected.items()}
    if layout.bf16:
        scales = {key: max(scale for k, scale in scales.items() if _layer(k) == _layer(key)) for key in scales}
    return {key: _relative(run[key], b, scales[key]) for key, b in expected.items()}


def _relative(a: Tensor, b: Tensor, scale: float) -> float:
    """Of a tensor that is zero (an expert's that no token chose), the difference itself."""
    return (a - b).abs().max().item() / (scale or 1.0)


def _layer(key: str) -> str:
    """`grad.0.decoder.layers.3.mixer.A_log` -> `grad.0.decoder.layers.3`."""
    head, _, tail = key.partition("layers.")
    return f"{head}{tail.split('.')[0]}" if tail else key


def main() -> int:
    cases = [c for c in EVERYTHING if not sys.argv[1:] or set(c) & set(sys.argv[1:])]
    if unknown := set(sys.argv[1:]) - set(MODELS) - set(LAYOUTS):
        print(f"unknown: {', '.join(unknown)}; models are {', '.join(MODELS)}; layouts {', '.join(LAYOUTS)}")
        return 2
    names = list(dict.fromkeys(name for _, name in cases))
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with tqdm(total=len(with_references(cases)), unit="run") as progress:
            for count in run_all(directory, cases):
                progress.update(count)
        print("| model | rounding | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
        for model in dict.fromkeys(model for model, _ in cases):
            first = next(name for m, name in cases if m == model)
            cells = [f"{rounding_of(directory, model, first):.1e}"]
            for name in names:
                worst = max(differences(directory, model, name).values()) if (model, name) in cases else None
                cells.append("" if worst is None else f"{worst:.1e}")
                if worst is not None and not worst <= (allowed := tolerance(directory, model, name)):
                    wrong.append(f"{model} {name}: {worst:.1e}, more than {allowed:.1e}")
            print(f"| {model} | " + " | ".join(cells) + " |")
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
