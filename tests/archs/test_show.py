"""What `show` says of architectures, against published numbers and counts by hand; and the three commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archscale_megatron.archs import __main__ as program
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.inference import cache_bytes_per_token, state_bytes
from archscale_megatron.archs.show import describe, page
from tests.command_lines import ROOT

KEYS = {
    "pattern", "layers", "parameters", "flops_per_token", "tensor_parallel_sizes", "cache_bytes_per_token",
    "state_bytes",
}  # fmt: skip


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "archscale_megatron.archs", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_list_names_every_family() -> None:
    result = start("list")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2::2]] == list(FAMILIES)
    assert lines[2 + 2 * list(FAMILIES).index("sambay")].split() == [
        "sambay", "0.16", "1.07", "3.46", "8.10", "multiples", "of", "4"
    ]  # fmt: skip


def test_show_as_json() -> None:
    result = start("show", "sambay", "--depth", "16", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert facts.keys() >= KEYS
    assert facts["pattern"] == "m-W-m-W-m-W-m-W-m-*-U-X-U-X-U-X-"
    embedding = 32000 * 124 * 16
    assert facts["parameters"] == {
        "total_tied": 1002330688 + embedding,
        "total_untied": 1002330688 + 2 * embedding,
        "non_embedding": 1002330688,
        "embedding": embedding,
    }
    assert facts["tensor_parallel_sizes"] == [1, 2, 4]
    assert [layer["index"] for layer in facts["layers"]] == list(range(16))
    assert {i: layer["writes"] for i, layer in enumerate(facts["layers"]) if layer["writes"]} == {
        8: ["memory"],
        9: ["kv"],
    }
    assert {i: layer["reads"] for i, layer in enumerate(facts["layers"]) if layer["reads"]} == {
        **{i: ["memory"] for i in (10, 12, 14)},
        **{i: ["kv"] for i in (11, 13, 15)},
    }
    windows = {layer["mixer"]: layer["window"] for layer in facts["layers"]}
    assert windows["sliding-window attention"] == 128 and windows["full attention"] is None
    final_norm = 124 * 16
    assert sum(layer["parameters"] for layer in facts["layers"]) + final_norm == 1002330688
    assert 3 * (sum(layer["flops_per_token"] for layer in facts["layers"]) + 2 * embedding) == pytest.approx(
        facts["flops_per_token"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_page(family: str) -> None:
    """At all depths up to 32 that it can have."""
    models = program._models(family)
    assert models
    for depth, arch in models.items():
        facts = describe(arch, 4096)
        assert len(facts["layers"]) == depth
        assert 1 in facts["tensor_parallel_sizes"]
        assert all(split["pattern"].replace("|", "") == arch.pattern for split in facts["pipeline_splits"])
        assert page(arch, 4096).startswith(f"{family}, depth {depth}: {arch.pattern}\n")


def test_page() -> None:
    text = page(build_architecture("sambay", 16), 4096)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "0 to 7 4 x Mamba-1 72,058,880" in rows
    assert "sliding-window attention 128 57,397,120" in rows
    assert "8 Mamba-1 memory 72,058,880" in rows
    assert "9 full attention all keys, values 57,397,120" in rows
    assert "10 to 15 3 x Gated Memory Unit memory of 8 62,984,064" in rows
    assert "cross attention all keys, values of 9 55,365,504" in rows
    by_mlp = page(build_architecture("sambaymlp", 8), 4096)
    assert "memory (its MLP)" in by_mlp


def test_readme_shows_what_is_printed() -> None:
    assert f"```text\n{page(build_architecture('sambay', 16), 4096)}\n```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "options", "per_token", "constant"),
    [
        ("transformer", {}, 8 * 2 * 16 * 2, 0),
        ("samba", {"local_window": 5}, 0, 4 * (2 * 128 * (3 * 2 + 16 * 4)) + 4 * 5 * 2 * 16 * 2),
        # three Mambas, two windows, one full attention; GMU and cross attention hold nothing
        ("sambay", {"local_window": 5}, 2 * 16 * 2, 3 * (2 * 128 * (3 * 2 + 16 * 4)) + 2 * 5 * 2 * 16 * 2),
        ("sambayw", {"local_window": 5, "context_length": 40}, 0,
         3 * (2 * 128 * (3 * 2 + 16 * 4)) + (2 * 5 + 20) * 2 * 16 * 2),
        # five Mamba-2: 8 heads of 64 channels, 128 states; the convolution has B and C too
        ("mambay2", {}, 2 * 16 * 2, 5 * ((512 + 2 * 128) * 3 * 2 + 8 * 64 * 128 * 4)),
        # five gated delta nets: one head, 256 key channels and 512 value channels
        ("gdny", {}, 2 * 16 * 2, 5 * ((256 + 256 + 512) * 3 * 2 + 256 * 512 * 4)),
    ],
)  # fmt: skip
def test_inference_cache(family: str, options: dict[str, int], per_token: int, constant: int) -> None:
    """Depth 8, width 128, two key-value heads of 8 channels."""
    arch = build_architecture(family, 8, aspect_ratio=16, head_dim=8, **options)
    assert (cache_bytes_per_token(arch), state_bytes(arch)) == (per_token, constant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show sambaz --depth 16", "sambaz: unknown family; did you mean samba"),
        ("show sambay --depth 10", "--depth 10: the depth of sambay must be a multiple of 4; the nearest: 8, 12"),
        ("show transformer --depth 14", "14 attention heads cannot share 3 key-value heads"),
        ("plot sambay --depth 8 --num-heads 6 --num-kv-heads 4 -o x.png", "6 attention heads cannot share 4 key-value"),
        ("show sambay --depth 16 --seq-length 0", "--seq-length 0: must be a positive integer"),
        ("show sambay --depth 16 --rotary-base 500", "sambay has no position embeddings"),
        ("show sambay", "the following arguments are required: --depth"),
        ("show sambay --depth x", "argument --depth: invalid int value: 'x'"),
        ("draw sambay", "invalid choice: 'draw'"),
        ("plot sambay --depth 8 -o nowhere/x.png", "-o nowhere/x.png: there is no directory nowhere; make it first"),
        ("plot sambay --depth 8 -o x.txt", "-o x.txt: cannot write .txt; use one of "),
        ("plot sambay --depth 8 -o x", "-o x: needs a suffix; use one of "),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments.split())
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    assert output.err.startswith("archs: error: ") and message in output.err
    assert output.err.count("\n") == 1


def test_exit_code_of_the_program(tmp_path: Path) -> None:
    result = start("plot", "sambaz", "--depth", "16", "-o", str(tmp_path / "x.png"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "did you mean" in result.stderr


def test_neither_torch_nor_megatron_is_imported() -> None:
    code = "import sys, archscale_megatron.archs.__main__, archscale_megatron.archs.plot; print(sorted(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    modules = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "'torch'" not in modules.stdout and "'megatron'" not in modules.stdout
