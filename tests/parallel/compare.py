"""Run all layouts and print how far each is from the single-process run.

python -m tests.parallel.compare: a Markdown table, rows layouts, columns families, cells the largest
relative difference of any gradient or updated parameter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file

from tests.launch import torchrun
from tests.parallel.layouts import CASES, FAMILIES, LAYOUTS, reference_of

TOLERANCE = 1e-5
# bf16 rounds every product of a sum that tensor parallelism cuts in two, and every gradient that crosses a stage.
TOLERANCE_BF16 = 6e-2


def run_all(directory: Path) -> None:
    """Train in every layout, a launch a world size; results go to `directory`."""
    for size in sorted({layout.world_size for layout in LAYOUTS.values()}):
        torchrun(size, "-m", "tests.parallel.worker", str(directory))


def differences(directory: Path, family: str, name: str) -> dict[str, float]:
    """For every tensor of a run, max |a - b| / max |b| against the single-process run b."""
    run = load_file(directory / f"{family}.{name}.safetensors")
    expected = load_file(directory / f"{family}.{reference_of(LAYOUTS[name])}.safetensors")
    assert run.keys() == expected.keys(), f"{name}: other tensors than the single-process run"
    return {key: ((run[key] - b).abs().max() / b.abs().max()).item() for key, b in expected.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        run_all(directory)
        print("| layout | " + " | ".join(FAMILIES) + " |\n|" + "---|" * (len(FAMILIES) + 1))
        for name in LAYOUTS:
            cells = [
                f"{max(differences(directory, family, name).values()):.1e}" if (family, name) in CASES else ""
                for family in FAMILIES
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
