"""results.jsonl as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

TOP = 25


def report(results: Path) -> str:
    """Markdown of all rows."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    parts = [_versions(rows), _ceilings(rows), _kernels(rows), _steps(rows), _shares(rows), _idle(rows), _longest(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(headers: Iterable[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, list(headers), tablefmt="github", disable_numparse=True) if rows else ""


def _versions(rows: list[dict[str, Any]]) -> str:
    row = next((dict(row) for row in rows if row["part"] == "versions"), {})
    return _table(("", ""), [[name, value] for name, value in row.items() if name != "part"])


def _ceilings(rows: list[dict[str, Any]]) -> str:
    found = [row for row in rows if row.get("name") == "ceilings"]
    return "\n".join(
        f"bf16 product of 8192 x 8192: {row['product_flops'] / 1e12:.0f} TFLOP/s; copy: {row['copy_bytes'] / 1e12:.2f} "
        "TB/s, read and written."
        for row in found
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        if row["part"] == "kernels" and "op" in row:
            what = [row["op"], f"{row['length']} x {row['batch']}", row["name"]]
            if "error" in row:
                table.append([*what, row["error"].splitlines()[0], "", ""])
            else:
                times = (row["forward_ms"], row["backward_ms"])
                table.append([*what, *(f"{ms:.3f}" for ms in times), f"{row['peak_mib']:.0f}"])
    return _table(("kernel", "length x batch", "", "forward ms", "backward ms", "peak MiB"), table)


def _steps(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in _of_steps(rows):
        settings = row["settings"]
        batch = f"{settings['micro_batches']} x {settings['micro_batch']} x {settings['length']}"
        if "error" in row:
            table.append([row["name"], batch, row["error"].splitlines()[0][:200]])
            continue
        table.append(
            [
                row["name"], batch, f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}",
                f"{row['tflops']:.0f}", f"{row['mfu']:.1%}", f"{row['peak_memory_gib']:.1f}",
                f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
            ]
        )  # fmt: skip
    headers = ("model", "batch", "parameters", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "loss")
    return _table(headers, table)


def _shares(rows: list[dict[str, Any]]) -> str:
    profiled = [row for row in _of_steps(rows) if row.get("kernel_ms_sum")]
    kinds = list(dict.fromkeys(kind for row in profiled for kind in row["kernel_ms"]))
    table = []
    for row in profiled:
        shares = (row["kernel_ms"].get(kind, 0) / row["kernel_ms_sum"] for kind in kinds)
        step = 1e3 * sorted(row["seconds"])[len(row["seconds"]) // 2]
        table.append([row["name"], f"{step:.0f}", f"{row['kernel_ms_sum']:.0f}", *(f"{share:.1%}" for share in shares)])
    return _table(("model", "step ms", "kernels ms", *kinds), table)


def _idle(rows: list[dict[str, Any]]) -> str:
    tables = [
        f"Times in which the GPU had nothing to do, in a step of {row['name']}:\n\n"
        + _table(
            ("ms", "behind", "before"), [[f"{ms:.2f}", f"`{last}`", f"`{name}`"] for ms, last, name in row["gaps"]]
        )
        for row in _of_steps(rows)
        if row.get("gaps")
    ]
    return "\n\n".join(tables)


def _longest(rows: list[dict[str, Any]]) -> str:
    tables = [
        f"The longest kernels of {row['name']}, a step:\n\n"
        + _table(("ms", "calls", "kernel"), [[f"{ms:.2f}", n, f"`{name}`"] for name, ms, n in row["top_kernels"][:TOP]])
        for row in _of_steps(rows)
        if row.get("top_kernels")
    ]
    return "\n\n".join(tables)


def _of_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] == "steps"]
