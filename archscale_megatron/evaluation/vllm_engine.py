"""Generation by vLLM, where it is installed, with the inputs and outputs of every other engine.

vLLM reads an export, and computes it with a class of its own: it has one for Llama models, some releases have one for
Phi-4-mini-flash, and none has one for the format `archscale`. As in ArchScale's evaluation of reasoning, prefix
caching and chunked prefill are off: they assume that a layer's state at any token can be taken up again, which the
recurrent layers of a hybrid do not give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from archscale_megatron.evaluation.engine import Generated, Sampling, generator, source_of
from archscale_megatron.hf.folder import CONFIG, HFFolder
from archscale_megatron.hf.importing import described

DTYPES = {None: "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 512
"""Prompts that vLLM has at a time: it says nothing before all of them have ended."""


def open_export(
    path: Path, *, dtype: str | None = None, max_length: int | None = None, tensor_parallel_size: int = 1
) -> VllmEngine:
    """An export, in vLLM.

    Args:
        dtype: fp32, bf16 or fp16; None is what is stored.
        max_length: of a sequence, tokens; None is what the model was trained on.
        tensor_parallel_size: GPUs that share the model; vLLM starts their processes itself.
    Raises:
        ValueError: vLLM is not installed, or has no class for the model, or `path` is no export.
        HFError: the export is damaged.
    """
    if not (path / CONFIG).exists():
        raise ValueError(
            f"--engine vllm: {path} is no export; write one with python -m archscale_megatron.hf export, or give "
            "--engine transformers"
        )
    folder = HFFolder(path)
    _, arch, _ = described(folder)
    try:
        import vllm
    except ImportError:
        raise ValueError("--engine vllm: vLLM is not installed; install it, or give --engine transformers") from None
    names = folder.config.get("architectures") or []
    if not set(names) & set(vllm.ModelRegistry.get_supported_archs()):
        raise ValueError(
            f"--engine vllm: vLLM {vllm.__version__} has no class for {', '.join(names) or 'a model without a class'}; "
            "give --engine transformers, or export with --format llama or phi4flash where that holds the model"
        )
    model = vllm.LLM(
        model=str(path),
        dtype=DTYPES[dtype],
        max_model_len=max_length,
        tensor_parallel_size=tensor_parallel_size,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
    )
    source = source_of(path, arch.family, arch.depth)
    return VllmEngine(model, source, max_length or folder.config["max_position_embeddings"])


class VllmEngine:
    """The half of an `Engine` that generates; vLLM's processes are its own, so there is one rank."""

    rank = 0
    world_size = 1

    def __init__(self, model: Any, source: dict[str, Any], max_length: int) -> None:
        """
        Args:
            model: a `vllm.LLM`.
        """
        self._model, self.source, self.max_length = model, source, max_length
        self.tokenizer = model.get_tokenizer()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Generated]]:
        """(index, text) of each prompt, in order; see `Engine.generate`.

        A text depends on the seed and its number, and on vLLM's rounding, which the batch may change.
        """
        import vllm

        numbers = range(len(prompts)) if numbers is None else numbers
        for first in range(0, len(prompts), BLOCK):
            block = range(first, min(first + BLOCK, len(prompts)))
            parameters = [
                vllm.SamplingParams(
                    n=1,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    stop=list(sampling.stop) or None,
                    seed=generator(sampling.seed, numbers[i]).initial_seed() % 2**31,
                    max_tokens=sampling.max_new_tokens,
                )
                for i in block
            ]
            tokens = [{"prompt_token_ids": list(prompts[i])} for i in block]
            outputs = self._model.generate(tokens, parameters, use_tqdm=False)
            for i, output in zip(block, outputs, strict=True):
                one = output.outputs[0]
                yield i, Generated(list(one.token_ids), one.text, one.finish_reason == "stop")
