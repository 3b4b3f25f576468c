"""The adapter of vLLM, against a module with the signatures of vLLM's documentation."""

import inspect
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from archscale_megatron.evaluation import vllm_engine
from archscale_megatron.evaluation.engine import Sampling
from archscale_megatron.evaluation.vllm_engine import open_export

# docs.vllm.ai: vllm.SamplingParams, of which these are the fields that an evaluation might set, and their defaults.
SAMPLING_PARAMS = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None, "ignore_eos": False,
    "max_tokens": 16, "min_tokens": 0, "logprobs": None, "detokenize": True, "skip_special_tokens": True,
}  # fmt: skip


@dataclass
class CompletionOutput:
    """docs.vllm.ai: vllm.outputs.CompletionOutput."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class Stub:
    """What was called."""

    built: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[list[Any], list[Any]]] = field(default_factory=list)


def export(path: Path, architecture: str = "LlamaForCausalLM") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], "max_position_embeddings": 64}))
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """vLLM, as far as it is used; another name of an argument is a TypeError, as there."""
    made = Stub()

    class SamplingParams:
        def __init__(self, **given: Any) -> None:
            assert given.keys() <= SAMPLING_PARAMS.keys(), given.keys() - SAMPLING_PARAMS.keys()
            self.__dict__ |= SAMPLING_PARAMS | given
            assert self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_tokens >= 1

    class LLM:
        def __init__(
            self, model: str, *, tokenizer: str | None = None, trust_remote_code: bool = False, dtype: str = "auto",
            tensor_parallel_size: int = 1, seed: int = 0, gpu_memory_utilization: float = 0.9,
            max_model_len: int | None = None, enable_prefix_caching: bool | None = None,
            enable_chunked_prefill: bool | None = None, max_num_batched_tokens: int | None = None,
        ) -> None:  # fmt: skip
            here = dict(locals())
            made.built = {name: here[name] for name in inspect.signature(LLM.__init__).parameters if name != "self"}
            assert not trust_remote_code

        def get_tokenizer(self) -> str:
            return "the tokenizer"

        def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
            made.calls.append((prompts, sampling_params))
            assert len(prompts) == len(sampling_params) and not use_tqdm
            return [
                RequestOutput(
                    str(i), None, prompt["prompt_token_ids"],
                    [CompletionOutput(0, f"{prompt['prompt_token_ids']} {one.seed}", (7, 8), finish_reason=reason)],
                )
                for i, (prompt, one, reason) in enumerate(
                    zip(prompts, sampling_params, ["stop", "length"] * len(prompts), strict=False)
                )
            ]  # fmt: skip

    class ModelRegistry:
        @staticmethod
        def get_supported_archs() -> Any:
            return {"LlamaForCausalLM": None}.keys()

    module = types.ModuleType("vllm")
    module.__dict__.update(
        LLM=LLM, SamplingParams=SamplingParams, ModelRegistry=ModelRegistry, __version__="0.0.stub"
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", module)
    described = (None, types.SimpleNamespace(family="transformer", depth=2), [])
    monkeypatch.setattr(vllm_engine, "described", lambda folder: described)
    monkeypatch.setattr(vllm_engine, "HFFolder", lambda path: types.SimpleNamespace(
        config=json.loads((path / "config.json").read_text())
    ))  # fmt: skip
    return made


def test_what_vllm_is_asked(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "BLOCK", 2)
    engine = open_export(export(tmp_path / "e"), dtype="bf16", max_length=32, tensor_parallel_size=4)
    asked = {name: stub.built[name] for name in ("model", "dtype", "max_model_len", "tensor_parallel_size")}
    assert asked == {"model": str(tmp_path / "e"), "dtype": "bfloat16", "max_model_len": 32, "tensor_parallel_size": 4}
    assert stub.built["enable_prefix_caching"] is False and stub.built["enable_chunked_prefill"] is False
    assert engine.tokenizer == "the tokenizer" and engine.max_length == 32
    assert (engine.rank, engine.world_size, engine.source["architecture"]) == (0, 1, "transformer_d2")

    sampling = Sampling(20, 0.6, 0.95, 5, ("Q:",), seed=3)
    found = dict(engine.generate([[1, 2], [3], [1, 2]], sampling, [10, 11, 12]))
    assert [found[i].ended for i in range(3)] == [True, False, True] and found[0].ids == [7, 8]
    assert [len(prompts) for prompts, _ in stub.calls] == [2, 1]
    prompts = [one for call, _ in stub.calls for one in call]
    parameters = [one for _, call in stub.calls for one in call]
    assert prompts == [{"prompt_token_ids": ids} for ids in ([1, 2], [3], [1, 2])]
    common = {"n": 1, "temperature": 0.6, "top_p": 0.95, "top_k": 5, "stop": ["Q:"], "max_tokens": 20}
    for one in parameters:
        assert {name: getattr(one, name) for name in common} == common
        assert type(one.seed) is int and 0 <= one.seed < 2**31
    assert len({one.seed for one in parameters}) == 3
    # A text depends on the seed and its number, not on where it stands.
    assert dict(engine.generate([[1, 2]], sampling, [12]))[0].text == found[2].text
    assert dict(engine.generate([[1, 2]], Sampling(20, 0.6, seed=4), [12]))[0].text != found[2].text
    unnumbered = dict(engine.generate([[1, 2], [3]], sampling))
    assert unnumbered == dict(engine.generate([[1, 2], [3]], sampling, [0, 1]))


def test_defaults(stub: Stub, tmp_path: Path) -> None:
    engine = open_export(export(tmp_path / "e"))
    assert (stub.built["dtype"], stub.built["max_model_len"], engine.max_length) == ("auto", None, 64)
    list(engine.generate([[1]], Sampling(4)))
    assert stub.calls[0][1][0].temperature == 0 and stub.calls[0][1][0].stop is None
    assert list(engine.generate([], Sampling(4))) == []


def test_errors(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--engine vllm: vLLM 0.0.stub has no class for ArchScaleForCausalLM; give "):
        open_export(export(tmp_path / "own", "ArchScaleForCausalLM"))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="--engine vllm: .*run is no export; write one with "):
        open_export(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="--engine vllm: vLLM is not installed; install it, or give --engine transf"):
        open_export(export(tmp_path / "e"))
