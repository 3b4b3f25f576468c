"""Exports in the newest release of transformers, in a process of its own: logits and texts of the release here."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from archscale_megatron.hf.auto import register
from archscale_megatron.hf.export import export
from tests.hf.cases import architecture, directory_of
from tests.hf.test_export import saved

RELEASE = Path(sys.prefix) / "transformers-5"
# Every kind of layer; the first is a Llama.
CASES = [
    ("transformer", False), ("transformersa-with-options", True), ("sambay", True), ("sambay2", False), ("gdny", True),
    ("sambayattn-with-options", False), ("sambay_gqa4_moe", True),
]  # fmt: skip
TOKENS, NEW = (2, 12), 8

PROGRAM = f"""
import sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("5."), transformers.__version__
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    AutoTokenizer.from_pretrained(folder)
    given = torch.load(folder / "given.pt")
    with torch.no_grad():
        found = {{"logits": model(**given).logits}}
    options = dict(max_new_tokens={NEW}, min_new_tokens={NEW}, do_sample=False)
    found["greedy"] = model.generate(**given, **options)
    found["beams"] = model.generate(**given, **options, num_beams=3)
    found["chunks"] = model.generate(**given, **options, prefill_chunk_size=5)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.save(found, folder / "found.pt")
"""


def expected(folder: Path, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the release that is installed."""
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    greedy, beams = (model.generate(**given, **options, num_beams=number) for number in (1, 3))
    with torch.no_grad():
        return {"logits": model(**given).logits, "greedy": greedy, "beams": beams, "chunks": greedy}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    assert RELEASE.is_dir(), f"{RELEASE} is missing: `make test` installs tests/hf/transformers-5.txt there"
    root = tmp_path_factory.mktemp("exports")
    tokens = torch.randint(100, TOKENS, generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    found = {}
    for case in CASES:
        arch = architecture(*case)
        if arch.rotary_base is not None:
            arch = dataclasses.replace(arch, rotary_base=500)  # not what a config without it would have
        run, _ = saved(root / "runs" / directory_of(*case), arch)
        found[case] = root / directory_of(*case)
        export(run, found[case])
        torch.save({"input_ids": tokens, "attention_mask": mask}, found[case] / "given.pt")
    environment = os.environ | {"PYTHONPATH": str(RELEASE), "HF_MODULES_CACHE": str(root / "modules")}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, found.values())],
        cwd=root, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: directory_of(*case))
def test_logits_and_texts(folders: dict[tuple[str, bool], Path], case: tuple[str, bool]) -> None:
    folder = folders[case]
    found, given = torch.load(folder / "found.pt"), torch.load(folder / "given.pt")
    wanted = expected(folder, given)
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(found["logits"][seen], wanted["logits"][seen], rtol=1e-5, atol=1e-5)
    for way in ("greedy", "beams", "chunks"):
        assert torch.equal(found[way], wanted[way]), way


def test_what_was_read_is_newer() -> None:
    lines = (Path(__file__).parent / "transformers-5.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line)
    for name, version in wanted.items():
        assert (RELEASE / f"{name.replace('-', '_')}-{version}.dist-info").is_dir()
