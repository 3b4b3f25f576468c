"""Folders that lie: each lie is one clear line, and nothing is run or read beyond the headers."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from archscale_megatron.hf.folder import HFError, HFFolder

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.randn(4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.tensor([[1.0, float("nan"), -0.0]], dtype=torch.float16),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def make(folder: Path) -> Path:
    """A good folder of two shards."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({name: TENSORS[name] for name in "ab"}, folder / ONE)
    save_file({"c": TENSORS["c"]}, folder / TWO)
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 38}, "weight_map": weight_map}))


def rename_in_index(folder: Path, name: str, shard: str) -> None:
    write_index(folder, json.loads((folder / INDEX).read_text())["weight_map"] | {name: shard})


def whole(folder: Path) -> HFFolder:
    opened = HFFolder(folder)
    opened.check(SHAPES)
    return opened


def assert_bitwise(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))


@pytest.mark.parametrize("sharded", [True, False])
def test_reads_every_tensor_bit_for_bit(tmp_path: Path, sharded: bool) -> None:
    folder = make(tmp_path / "x")
    if not sharded:
        for name in (INDEX, ONE, TWO):
            (folder / name).unlink()
        save_file(TENSORS, folder / "model.safetensors")
    opened = whole(folder)
    assert opened.config == {"model_type": "llama"}
    assert sorted(opened.names()) == ["a", "b", "c"]
    for name in ("c", "a", "b"):
        assert (opened.shape(name), opened.dtype(name)) == (SHAPES[name], TENSORS[name].dtype)
        assert_bitwise(opened.read(name), TENSORS[name])


def test_leaves_alone_what_it_does_not_need(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    (folder / "model.py").write_text("raise SystemExit")
    buffers = load_file(folder / TWO) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(buffers, folder / TWO)
    rename_in_index(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", TWO)
    whole(folder)


class Bomb:
    """What pickle makes of it runs code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (Path("exploded"), "")


def pickled(folder: Path) -> None:
    for name in (INDEX, ONE, TWO):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickled_pth(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "consolidated.00.pth")


def pickled_shard(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    rename_in_index(folder, "c", "pytorch_model.bin")


def outside(folder: Path) -> Path:
    """The second shard, moved out of the folder."""
    target = folder.parent / TWO
    (folder / TWO).rename(target)
    return target


def linked_shard(folder: Path) -> None:
    (folder / TWO).symlink_to(outside(folder))


def linked_config(folder: Path) -> None:
    target = folder.parent / "config.json"
    (folder / "config.json").rename(target)
    (folder / "config.json").symlink_to(target)


def looping_link(folder: Path) -> None:
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(folder / TWO)


def truncate(folder: Path, size: int) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:size])


def in_both(folder: Path) -> None:
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / TWO)


def not_in_index(folder: Path) -> None:
    save_file({"d": TENSORS["a"], "c": TENSORS["c"]}, folder / TWO)


def swapped(folder: Path) -> None:
    write_index(folder, {"a": ONE, "b": TWO, "c": ONE})


def replaced(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    shard = load_file(folder / ONE)
    del shard[name]
    save_file(shard | ({} if tensor is None else {name: tensor}), folder / ONE)


def extra(folder: Path) -> None:
    save_file({"c": TENSORS["c"], "d": TENSORS["a"]}, folder / TWO)
    rename_in_index(folder, "d", TWO)


def missing(folder: Path) -> None:
    (folder / TWO).unlink()
    write_index(folder, {"a": ONE, "b": ONE})


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "x: no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is a directory": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "not a file"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds list, not an object"),
    "config is cut": (lambda f: (f / "config.json").write_text('{"model_type"'), "config.json: not JSON"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x80"), "config.json: not JSON"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json: not JSON"),
    "config links out": (linked_config, "config.json: a link to .*, which is not in the folder"),
    "pickle": (pickled, "pytorch_model.bin: a pickle, which runs code when it is read; save the model again"),
    "pth": (pickled_pth, "consolidated.00.pth: a pickle"),
    "pickle in the index": (pickled_shard, "pytorch_model.bin: a pickle"),
    "index names no safetensors": (lambda f: rename_in_index(f, "c", "config.json"), "'config.json', which is no"),
    "no weights": (lambda f: [(f / n).unlink() for n in (INDEX, ONE, TWO)], "has neither model.safetensors nor"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json: not JSON"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index with an empty map": (lambda f: write_index(f, {}), "has no weight_map"),
    "index with numbers": (lambda f: write_index(f, {"a": 1}), "has no weight_map"),
    "parent": (lambda f: (outside(f), rename_in_index(f, "c", f"../{TWO}")), "refuses the file name '../model"),
    "absolute": (lambda f: rename_in_index(f, "c", str(outside(f))), "refuses the file name '/"),
    "subfolder": (lambda f: rename_in_index(f, "c", f"sub/{TWO}"), "refuses the file name"),
    "link out": (linked_shard, "a link to .*, which is not in the folder; copy the folder"),
    "link to itself": (looping_link, f"{TWO}: no such file"),
    "missing shard": (lambda f: (f / TWO).unlink(), f"{TWO}: no such file"),
    "shard is a directory": (lambda f: ((f / TWO).unlink(), (f / TWO).mkdir()), f"{TWO}: not a file"),
    "unnamed shard": (lambda f: shutil.copy(f / ONE, f / "model.safetensors"), "does not name model.safetensors"),
    "empty shard": (lambda f: truncate(f, 0), f"{ONE}: truncated or not a safetensors file"),
    "half a header": (lambda f: truncate(f, 30), f"{ONE}: truncated or not a safetensors file"),
    "lost bytes": (lambda f: truncate(f, -1), f"{ONE}: truncated or not a safetensors file"),
    "junk": (lambda f: (f / ONE).write_bytes(b"\xff" * 99), f"{ONE}: truncated or not a safetensors file"),
    "shard lacks": (lambda f: rename_in_index(f, "d", TWO), f"{TWO}: lacks d, which {INDEX} says is there"),
    "in two shards": (in_both, f"both {ONE} and {TWO} hold a"),
    "not in the index": (not_in_index, f"{TWO}: holds d, which is not in {INDEX}"),
    "in another shard": (swapped, f"{ONE}: holds b, which {INDEX} says is in {TWO}"),
    "extra tensor": (extra, "x: has d, which its config.json has no place for"),
    "missing tensor": (missing, "x: lacks c, which its config.json asks for"),
    "wrong shape": (lambda f: replaced(f, "a", torch.ones(3, 2)), r"a is \[3, 2\]; its config.json asks for \[2, 3\]"),
    "integers": (lambda f: replaced(f, "a", torch.ones(2, 3).long()), "a is I64; weights are F64, F32, F16, BF16"),
    "eight bits": (lambda f: replaced(f, "a", torch.ones(2, 3).to(torch.float8_e4m3fn)), "a is F8_E4M3; weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refuses(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "x")
    CASES[case][0](folder)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HFError, match=CASES[case][1]) as error:
        whole(folder)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_refuses_a_dtype_that_is_not_wanted(tmp_path: Path) -> None:
    folder = HFFolder(make(tmp_path / "x"))
    with pytest.raises(HFError, match="x: b is bfloat16; legal: float32, float16"):
        folder.check(SHAPES, (torch.float32, torch.float16))


def test_names_the_first_few_of_many(tmp_path: Path) -> None:
    with pytest.raises(HFError, match="lacks t0, t1, t2 and 7 more, which"):
        HFFolder(make(tmp_path / "x")).check({f"t{n}": (1,) for n in range(10)})


def test_says_when_a_shard_vanishes_after_the_check(tmp_path: Path) -> None:
    folder = whole(make(tmp_path / "x"))
    (folder.path / TWO).unlink()
    with pytest.raises(HFError, match=f"{TWO}: no such file"):
        folder.read("c")
