"""The stack of hybrid layers that Megatron's HybridModel builds from our spec, in the place of its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from archscale_megatron.layers.hybrid_layer import scaled
from archscale_megatron.layers.norm import norm_class
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.model.payload import pack, unpack


class SharedStateStack(MegatronModule):
    """Runs the layers of one pipeline segment, handing the shared state from layer to layer and, packed
    behind the hidden states, from stage to stage.

    Args:
        config: with its architecture and layer pattern.
        submodules: the spec of a layer for every symbol of the pattern.
        layer_type_list: the symbols of this segment.
        pp_layer_offset: hybrid layers in earlier segments.
    """

    def __init__(
        self,
        config: HybridConfig,
        submodules: dict[str, ModuleSpec],
        layer_type_list: list[str],
        pp_layer_offset: int,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # dtype, name: what Megatron's own stack is told besides
    ) -> None:
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.tp_group = pg_collection.tp
        self.input_tensor: Any = None  # a Tensor once the schedule has set it
        arch = config.architecture
        self.layers: Any = nn.ModuleList()
        for index, symbol in enumerate(layer_type_list, start=pp_layer_offset):
            with get_fp8_context(config, index, is_init=True) if config.fp8 else nullcontext():
                layer = build_module(
                    submodules[symbol],
                    config=config,
                    layer_number=index + 1,
                    pg_collection=pg_collection,
                    writes=arch.writes(index),
                )
            self.layers.append(layer)
        end = pp_layer_offset + len(layer_type_list)
        self.payload_in = () if pre_process else arch.payload_after(pp_layer_offset - 1)
        self.payload_out = () if post_process else arch.payload_after(end - 1)
        if post_process:
            self.final_norm = norm_class(config)(config, config.hidden_size, config.layernorm_epsilon)
        else:
            self.width_out = config.boundary_width(self.payload_out)

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Called by the pipeline schedules with what the previous stage sent."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,  # inference contexts, packed sequences, padding masks: not for training on whole sequences
    ) -> Tensor:
        """[s, b, h] (s / tp under sequence parallelism) -> the same, normed, on the last stage; packed with
        the shared state elsewhere.

        HybridModel passes its `attention_mask` on to here, on every stage. Causality is the layers' own; what they
        cannot know is where documents start, so that is what the mask says: bool [s, b], all s tokens on every rank,
        True at the first token of each document (`ops.documents`), or None for one document.
        """
        state = SharedState()
        if not self.pre_process:
            hidden_states, state = unpack(self.input_tensor, self.payload_in, self.config.architecture, self.config)
        context = SequenceContext(rotary_pos_emb=rotary_pos_emb, document_starts=attention_mask)
        # Under sequence parallelism each rank drops its own tokens.
        fork = self.config.sequence_parallel and self.config.hidden_dropout > 0
        rng = tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext()
        delayed = self.config.fp8 and self.config.fp8_recipe == Fp8Recipe.delayed
        with rng, get_fp8_context(self.config) if delayed else nullcontext():
            for start, stop, recompute in self._groups():
                run = self._recomputed if recompute else self._run
                hidden_states = run(start, stop, hidden_states, state, context)
        if self.post_process:
            # Here, not on the logits: so it reaches every loss, and is exact in the scale of the norm on export.
            hidden_states = scaled(self.final_norm(hidden_states), self.config.architecture.logit_multiplier)
        else:
            hidden_states = pack(hidden_states, state, self.payload_out, self.width_out)
        # The schedules free the data of what is sent; a view would keep it alive.
        return make_viewless_tensor(hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)

    def _groups(self) -> list[tuple[int, int, bool]]:
        """(first layer, one past the last, recompute?) as `--recompute-method` and `-num-layers` say."""
        count = len(self.layers)
        if self.config.recompute_granularity != "full" or not self.training:
            return [(0, count, False)]
        size = self.config.recompute_num_layers
        if self.config.recompute_method == "uniform":
            return [(i, min(i + size, count), True) for i in range(0, count, size)]
        return [(i, i + 1, i < size) for i in range(count)]

    def _run(
        self, start: int, stop: int, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> Tensor:
        per_layer = self.config.fp8 and self.config.fp8_recipe != Fp8Recipe.delayed
        for layer in self.layers[start:stop]:
            fp8 = get_fp8_context(self.config, layer.layer_number - 1) if per_layer else nullcontext()
            with fp8:
                hidden_states = layer(hidden_states, state, context)
        return hidden_states

    def _recomputed(
        self, start: int, stop: int, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> Tensor:
        """Layers [start, stop) without their activations; what they write leaves as further outputs."""

        def run(hidden_states: Tensor, *values: Tensor | None) -> tuple[Tensor, ...]:
            local = SharedState(*values)
            hidden_states = self._run(start, stop, hidden_states, local, context)
            written = [getattr(local, name) for name in writes]
            return hidden_states, *written

        before = (state.memory, state.key, state.value)
        writes = self._writes(start, stop)
        hidden_states, *written = tensor_parallel.checkpoint(
            run, self.config.distribute_saved_activations, hidden_states, *before
        )
        for name, value in zip(writes, written, strict=True):
            setattr(state, name, value)
        return hidden_states

    def _writes(self, start: int, stop: int) -> list[str]:
        """The fields of the shared state that layers [start, stop) write."""
        arch = self.config.architecture
        written = {name for layer in self.layers[start:stop] for name in arch.writes(layer.layer_number - 1)}
        return (["memory"] if "memory" in written else []) + (["key", "value"] if "kv" in written else [])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Layers under their global number, so that a checkpoint loads at any pipeline layout."""
        sharded: ShardedStateDict = {}
        for index, layer in enumerate(self.layers):
            local = f"{prefix}layers.{index}."
            layer_dict = layer.sharded_state_dict(local, sharded_offsets, metadata)
            replace_prefix_for_sharding(layer_dict, local, f"{prefix}layers.{layer.layer_number - 1}.")
            sharded |= layer_dict
        if self.post_process:
            sharded |= sharded_state_dict_default(
                self.final_norm, f"{prefix}final_norm.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded
