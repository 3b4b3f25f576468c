"""Exports as users make them: files, dtypes, shards, memory, what is refused; and a model that goes once around."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint import CheckpointError
from archscale_megatron.checkpoint.tensors import write_release
from archscale_megatron.hf import archscale, llama
from archscale_megatron.hf.__main__ import main
from archscale_megatron.hf.export import KEPT_IN_FP32, export
from archscale_megatron.hf.folder import HFError, HFFolder
from archscale_megatron.hf.kinds import Map
from tests.hf.cases import architecture
from tests.launch import ROOT, torchrun

BYTES = {"tokenizer": {"type": "ByteLevelTokenizer", "model": None}, "options": {"seq_length": 64}}
Tensors = dict[str, Tensor]


def random_tensors(maps: list[Map]) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for one in maps for name, shape in one.megatron_shapes().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected_of(maps: list[Map], tensors: Tensors) -> Tensors:
    return {
        name: tensor
        for one in maps
        for name, tensor in zip(one.hf, one.to_hf([tensors[name] for name in one.megatron]), strict=True)
    }


def saved(directory: Path, arch: Architecture, run: dict | None = None) -> tuple[Path, Tensors]:
    """A run directory, and its tensors."""
    tensors = random_tensors(archscale.maps(arch))
    write_release(directory, arch, tensors.items(), run if run is not None else BYTES)
    return directory, tensors


@pytest.fixture(scope="module")
def sambay(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    return saved(tmp_path_factory.mktemp("sambay") / "run", dataclasses.replace(architecture("sambay", False)))


def check_tensors(folder: Path, expected: Tensors) -> None:
    found = HFFolder(folder)
    found.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    for name, tensor in expected.items():
        assert found.dtype(name) == tensor.dtype and torch.equal(found.read(name), tensor), name


def test_a_folder(sambay: tuple[Path, Tensors], tmp_path: Path) -> None:
    run, tensors = sambay
    arch = architecture("sambay", False)
    assert main(["export", "--load", str(run), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "configuration_archscale.py", "generation_config.json", "model.safetensors",
        "modeling_archscale.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    check_tensors(tmp_path / "out", expected_of(archscale.maps(arch), tensors))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert archscale.architecture(config) == arch
    assert (config["torch_dtype"], config["max_position_embeddings"]) == ("float32", 64)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 0, 1)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 1)


def test_plain_llama(tmp_path: Path) -> None:
    """With other multipliers than 1, folded into exactly the weights that they belong to."""
    arch = architecture("transformer-with-biases", True)
    run, tensors = saved(tmp_path / "run", arch)
    assert export(run, tmp_path / "out") == "llama"
    check_tensors(tmp_path / "out", expected_of(llama.maps(arch), tensors))
    found = HFFolder(tmp_path / "out")
    residual, query = arch.residual_multiplier, arch.softmax_scale * arch.head_dim**0.5
    assert len({residual, arch.logit_multiplier, query, 1.0}) == 4
    pairs = {
        "model.embed_tokens.weight": ("embedding.word_embeddings.weight", 1.0),
        "model.norm.weight": ("decoder.final_norm.weight", arch.logit_multiplier),
        "model.layers.1.self_attn.o_proj.weight": ("decoder.layers.2.mixer.linear_proj.weight", residual),
        "model.layers.1.self_attn.o_proj.bias": ("decoder.layers.2.mixer.linear_proj.bias", residual),
        "model.layers.1.mlp.down_proj.weight": ("decoder.layers.3.mixer.linear_fc2.weight", residual),
        "model.layers.1.mlp.down_proj.bias": ("decoder.layers.3.mixer.linear_fc2.bias", residual),
    }
    for name, (megatron, factor) in pairs.items():
        assert torch.equal(found.read(name), tensors[megatron] * factor), name
    first = tensors["decoder.layers.2.mixer.linear_qkv.weight"][: arch.head_dim]
    assert torch.equal(found.read("model.layers.1.self_attn.q_proj.weight")[: arch.head_dim], first * query)
    assert not (tmp_path / "out" / "modeling_archscale.py").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(sambay: tuple[Path, Tensors], tmp_path: Path, dtype: torch.dtype) -> None:
    run, tensors = sambay
    export(run, tmp_path / "out", dtype=dtype)
    expected = expected_of(archscale.maps(architecture("sambay", False)), tensors)
    assert any(name.endswith(KEPT_IN_FP32) for name in expected)
    check_tensors(
        tmp_path / "out",
        {name: tensor if name.endswith(KEPT_IN_FP32) else tensor.to(dtype) for name, tensor in expected.items()},
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_factors_of_half_precision_are_rounded_once(tmp_path: Path) -> None:
    arch = architecture("transformer", True)
    run, tensors = saved(tmp_path / "run", arch)
    export(run, tmp_path / "out", dtype=torch.bfloat16)
    got = HFFolder(tmp_path / "out").read("model.norm.weight")
    assert torch.equal(got, (tensors["decoder.final_norm.weight"] * arch.logit_multiplier).bfloat16())


def test_shards(sambay: tuple[Path, Tensors], tmp_path: Path) -> None:
    run, tensors = sambay
    arguments = ["export", "--load", str(run / "release"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--max-shard-size", "0.1MB"]) == 0
    shards = sorted(tmp_path.glob("out/model-*-of-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 110_000 for shard in shards)
    check_tensors(tmp_path / "out", expected_of(archscale.maps(architecture("sambay", False)), tensors))


def test_an_export_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint that does not say what it is."""
    run, _ = saved(tmp_path / "run", architecture("mamba", True), {})
    export(run, tmp_path / "out")
    assert "does not say what its tokenizer is" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/tokenizer*"))


def test_what_is_there_is_left_alone(sambay: tuple[Path, Tensors], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(FileExistsError, match="not empty"):
        export(sambay[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that fails, the last of what is there."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("hf: error: ")
    return lines[0]


def test_a_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = saved(tmp_path / "run", architecture("mamba", True))
    data = next((run / "release").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert data.name in refused(["export", "--load", str(run), "--output", str(tmp_path / "out")], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_is_refused(sambay: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(sambay[0]), str(tmp_path / "out")
    for arguments, message in {
        ("--load", run, "--format", "llama"): "--format llama: cannot hold a sambay model with its options; use auto",
        ("--load", str(tmp_path / "nothing")): "no such directory",
        ("--load", run, "--max-shard-size", "5"): "'5': give a number and one of KB, MB, GB, TB, such as 5GB",
        ("--load", run, "--max-shard-size", "0GB"): "give a number",
    }.items():
        assert message in refused(["export", "--output", out, *arguments], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.layers.3.norm.weight"), "lacks decoder.layers.3.norm.weight"),
        (lambda tensors: tensors.update({"decoder.extra": torch.zeros(2)}), "also has decoder.extra"),
        (lambda tensors: tensors.update({"decoder.final_norm.weight": torch.zeros(3)}), r"is \[3\]"),
        (
            lambda tensors: tensors.update({"embedding.word_embeddings.weight": torch.zeros(99, 40)}),
            r"embedding.word_embeddings.weight is \[99, 40\]; its architecture says \[100, 40\]",
        ),
    ],
)
def test_tensors_that_are_not_the_architecture_s(change: object, message: str, tmp_path: Path) -> None:
    arch = architecture("mamba", True)
    tensors = random_tensors(archscale.maps(arch))
    change(tensors)
    write_release(tmp_path / "run", arch, tensors.items(), {})
    with pytest.raises((HFError, CheckpointError), match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import resource, sys
from pathlib import Path
from archscale_megatron.hf.export import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=16_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory(tmp_path: Path) -> None:
    """Of about one shard; the model is nine times as large."""
    arch = build_architecture("sambay", 8, aspect_ratio=64, head_dim=64, vocab_size=4000)
    run, tensors = saved(tmp_path / "run", arch, {})
    assert sum(tensor.nbytes for tensor in tensors.values()) > 140_000_000
    del tensors
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), str(tmp_path / "out")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert len(list(tmp_path.glob("out/model-*"))) > 8
    assert int(finished.stdout.splitlines()[-1]) < 3 * 16_000_000


PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    raise SystemExit("the folder's code ran without being trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = AutoTokenizer.from_pretrained(sys.argv[1])("#!", return_tensors="pt")
print(model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape)
assert not any(name.startswith(("archscale_megatron", "megatron")) for name in sys.modules)
"""


def test_plain_transformers_reads_a_folder(sambay: tuple[Path, Tensors], tmp_path: Path) -> None:
    """Without this package, and with its own code only where that is trusted."""
    export(sambay[0], tmp_path / "out", dtype=torch.bfloat16)
    finished = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "out")],
        cwd=tmp_path, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "torch.Size([1, 6])" in finished.stdout


def test_around(tmp_path: Path) -> None:
    """A release checkpoint starts training at TP 2 x PP 2, whose checkpoint, at learning rate 0, exports the same."""
    arch = build_architecture(
        "sambay_gqa4_moe", 8, aspect_ratio=8, head_dim=8, local_window=16, vocab_size=100, tied_embeddings=False,
        sparsity=3, top_k=2,
    )  # fmt: skip
    _, tensors = saved(tmp_path / "imported", arch)
    log = torchrun(
        4, "pretrain_archscale.py", "--train-model", "sambay_gqa4_moe", "--depth", "8", "--aspect-ratio", "8",
        "--head-dim", "8", "--local-window", "16", "--sparsity", "3", "--top-k", "2",
        "--untie-embeddings-and-output-weights", "--vocab-size", "100", "--mock-data",
        "--tokenizer-type", "NullTokenizer", "--seq-length", "32", "--micro-batch-size", "2",
        "--global-batch-size", "2", "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--eval-iters", "0",
        "--use-distributed-optimizer", "--load", str(tmp_path / "imported"), "--save", str(tmp_path / "run"),
        "--save-interval", "1", "--log-interval", "1", "--num-workers", "0", "--tensor-model-parallel-size", "2",
        "--pipeline-model-parallel-size", "2", "--sequence-parallel",
    ).stdout  # fmt: skip
    assert "iteration        1/       1" in log
    export(tmp_path / "run", tmp_path / "out")
    check_tensors(tmp_path / "out", expected_of(archscale.maps(arch), tensors))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (100, 32)
