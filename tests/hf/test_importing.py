"""Import of folders that transformers or this project made; back out again they are the same, bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint.new_directory import new_directory
from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.tensors import CheckpointTensors
from archscale_megatron.hf import archscale, phi4flash
from archscale_megatron.hf.__main__ import main
from archscale_megatron.hf.export import export
from archscale_megatron.hf.folder import HFError, HFFolder
from archscale_megatron.hf.importing import import_folder, training_options
from archscale_megatron.hf.shards import write_json, write_shards
from archscale_megatron.mup.rules import Parametrization
from tests.data.models import train_bpe
from tests.hf.test_folder import assert_bitwise
from tests.hf.test_phi4flash import architecture as phi_architecture
from tests.launch import torchrun
from tests.training.test_arguments import Parse
from tests.training.test_arguments import parse as parse

LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
    "max_position_embeddings": 64,
}  # fmt: skip


def llama(path: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **options: Any) -> LlamaForCausalLM:
    """A folder that transformers writes, all of its tensors random."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.05))
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return model


def random_folder(path: Path, module: Any, arch: Architecture, dtype: torch.dtype) -> None:
    """A folder of one of our own formats, in shards."""
    draw = torch.Generator().manual_seed(2)
    shapes = {name: shape for one in module.maps(arch) for name, shape in one.hf_shapes().items()}
    tensors = {name: (torch.randn(shape, generator=draw) / 10).to(dtype) for name, shape in shapes.items()}
    with new_directory(path) as directory:
        write_json(directory / "config.json", module.config(arch, {}))
        write_shards(directory, iter(tensors.items()), [(n, t.shape, t.dtype) for n, t in tensors.items()], 30_000)


def assert_same(got: Path, expected: Path) -> None:
    one, other = HFFolder(got), HFFolder(expected)
    assert sorted(one.names()) == sorted(other.names())
    for name in one.names():
        assert_bitwise(one.read(name), other.read(name))


def own(family: str, **options: Any) -> Architecture:
    numbers = {"aspect_ratio": 5, "head_dim": 8, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 96}
    return build_architecture(family, 8, **numbers, **options)


MUPPP = Parametrization("mup++", width_ratio=0.7, base_head_dim=24)
FOLDERS: dict[str, Callable[[Path], object]] = {
    "llama": llama,
    "llama, shards, bf16": lambda path: llama(path, torch.bfloat16, "30KB"),
    "llama, tied, biases": lambda path: llama(path, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "phi4flash, tied": lambda path: random_folder(path, phi4flash, phi_architecture(), torch.float32),
    "phi4flash, untied, bf16": lambda path: random_folder(path, phi4flash, phi_architecture(False), torch.bfloat16),
    "mambay2": lambda path: random_folder(
        path, archscale, MUPPP.apply(dataclasses.replace(own("mambay2"), mamba2_head_dim=10)), torch.bfloat16
    ),
    "experts": lambda path: random_folder(
        path, archscale, own("sambay_gqa4_moe", sparsity=2, top_k=4, shared_expert=True), torch.float32
    ),
    "sgdny": lambda path: random_folder(
        path, archscale, dataclasses.replace(own("sgdny", tied_embeddings=False), gdn_head_dim=15), torch.float32
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    FOLDERS[case](tmp_path / "x")
    import_folder(tmp_path / "x", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back")
    assert_same(tmp_path / "back", tmp_path / "x")
    before, after = (HFFolder(tmp_path / name).config for name in ("x", "back"))
    differing = {name for name in after if name in before and before[name] != after[name]}
    assert differing <= {"torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"}


@pytest.mark.parametrize("field, value", [("pattern", "?-" * 8), ("family", "bert"), ("window", "5"), ("depth", None)])
def test_refuses_an_export_with_a_wrong_field(field: str, value: object, tmp_path: Path) -> None:
    random_folder(tmp_path / "x", archscale, own("sambay"), torch.float32)
    change(**{field: value})(tmp_path / "x")
    with pytest.raises(HFError, match="config.json: "):
        import_folder(tmp_path / "x", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    random_folder(tmp_path / "x", archscale, own("sambay"), torch.float32)
    import_folder(tmp_path / "x", tmp_path / "run", torch.bfloat16)
    tensors = CheckpointTensors(find_checkpoint(tmp_path / "run"))
    kept = {name.rpartition(".mixer.")[2] for name in tensors.names() if tensors.dtype(name) == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    folder = HFFolder(tmp_path / "x")
    got = tensors.read("decoder.final_norm.weight")
    assert_bitwise(got, folder.read("model.norm.weight").bfloat16())


@pytest.mark.parametrize("case", ["llama", "phi4flash, tied"])
def test_training_goes_on_at_another_layout(case: str, tmp_path: Path) -> None:
    """At TP 2 x PP 2, with the command line that is printed, and a learning rate of 0: no tensor changes."""
    FOLDERS[case](tmp_path / "x")
    _, options = import_folder(tmp_path / "x", tmp_path / "run")
    finished = torchrun(
        4, "pretrain_archscale.py", "--load", str(tmp_path / "run"), *options, "--save", str(tmp_path / "save"),
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--mock-data",
        "--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "1", "--lr", "0",
        "--weight-decay", "0", "--eval-iters", "0", "--log-interval", "1",
    )  # fmt: skip
    assert "successfully loaded checkpoint" in finished.stdout
    export(tmp_path / "save", tmp_path / "back")
    assert_same(tmp_path / "back", tmp_path / "x")


COMMANDS = {
    "llama with biases": own("transformer", qkv_bias=True, attention_output_bias=True, linear_bias=True),
    "llama without RoPE": own("transformer", rope=False, tied_embeddings=False),
    "phi4flash": phi_architecture(),
    "half a window": own("sambaywr", context_length=48),
    "experts": own("sambay_gqa4_moe", sparsity=2, top_k=4, shared_expert=True, sqrt_gate=True),
    "odd norms": own("mambay2", norm_epsilon=1e-6, normalization="LayerNorm", qk_norm=True),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_printed_options_are_the_architecture(case: str, parse: Parse) -> None:
    options = training_options(COMMANDS[case], {"max_position_embeddings": 64})
    assert parse(*options).architecture == COMMANDS[case]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "x")
    train_bpe(tmp_path / "x")
    assert main(["import", "--input", str(tmp_path / "x"), "--output", str(tmp_path / "run"), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == (
        f"pretrain_archscale.py --load {tmp_path / 'run'} --train-model transformer --depth 2 --hidden-size 48 "
        "--ffn-hidden-size 100 --num-heads 6 --num-kv-heads 2 --head-dim 16 --vocab-size 96 --norm-epsilon 1e-06 "
        "--rotary-base 500000 --untie-embeddings-and-output-weights --seq-length 64 --tokenizer-type "
        f"HuggingFaceTokenizer --tokenizer-model {tmp_path / 'x'} ..."
    )
    run = CheckpointTensors(find_checkpoint(tmp_path / "run")).run
    assert run["tokenizer"] == {"type": "HuggingFaceTokenizer", "model": str(tmp_path / "x")}
    assert run["imported"] == {"folder": str(tmp_path / "x"), "format": "llama"}
    with pytest.raises(SystemExit) as stopped:
        main(["import", "--input", str(tmp_path / "x"), "--output", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"hf: error: {tmp_path / 'run'}: not empty; give a new directory\n"


def change(**values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return apply


def add_tensor(path: Path) -> None:
    save_file(load_file(path / "model.safetensors") | {"x": torch.ones(1)}, path / "model.safetensors")


def remote_code(path: Path) -> None:
    """Importing a folder with code of its own runs none of it."""
    (path / "evil.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')")
    change(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(path)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown": (change(model_type="bert"), "model_type is 'bert'; import knows llama, phi4flash, archscale"),
    "no type": (change(model_type=["x"]), r"model_type is \['x'\]"),
    "remote code": (remote_code, "model_type is 'evil'"),
    "rope_scaling": (change(rope_scaling={"rope_type": "linear", "factor": 2.0}), "config.json: rope_scaling is"),
    "activation": (change(hidden_act="gelu"), "config.json: hidden_act is 'gelu'"),
    "text for a number": (change(hidden_size="48"), "config.json: hidden_size is '48'; here it is a number from 1 to"),
    "no heads": (change(num_attention_heads=0), "config.json: num_attention_heads is 0; here it is a number"),
    "uneven heads": (change(num_key_value_heads=4), "config.json: .* 6 attention heads cannot share 4 key-value"),
    "no number": (change(hidden_size=None), "config.json lacks hidden_size"),
    "text for a norm": (change(rms_norm_eps="1e-6"), "config.json: norm_epsilon is '1e-6', which is no float"),
    "text for a switch": (change(attention_bias="no"), "config.json: qkv_bias is 'no', which is no bool"),
    "many layers": (change(num_hidden_layers=10**12), "config.json: num_hidden_layers is 1000000000000; here it is"),
    "more layers": (change(num_hidden_layers=3), "lacks model.layers.2.input_layernorm.weight"),
    "other shape": (change(vocab_size=97), r"embed_tokens.weight is \[96, 48\]; its config.json asks for \[97, 48\]"),
    "extra": (add_tensor, "has x, which its config.json has no place for"),
    "tied": (change(tie_word_embeddings=True), "has lm_head.weight, which its config.json has no place for"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "x"
    llama(path)
    return path


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "x")
    WRONG[case][0](tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HFError, match=WRONG[case][1]) as error:
        import_folder(tmp_path / "x", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
