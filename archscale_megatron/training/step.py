"""One forward step: a batch for this rank, the model, the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from archscale_megatron.data.datasets import reads_data
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.model.spec import build_model
from archscale_megatron.ops.documents import starts_of_documents

SPIKE_FACTOR = 10  # a loss that is this many times the largest so far is reported (--check-for-spiky-loss)

straggler_timer = StragglerDetector()


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: HybridConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> HybridModel:
    """The stage of the model that Megatron asks for, from Megatron's global arguments."""
    args = get_args()
    if config is None:
        config = core_transformer_config_from_args(args, HybridConfig)
        config.layer_pattern = args.hybrid_layer_pattern
    return build_model(
        config,
        padded_vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        seed=args.seed,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def get_batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Tensor | None]:
    """tokens, position_ids, labels (int64) and loss_mask (fp32), [b, s] each, and document_starts (bool [s, b]); None
    where the stage needs none."""
    args = get_args()
    names = ("tokens", "position_ids", "labels", "loss_mask")
    if not reads_data(vp_stage):
        return dict.fromkeys((*names, "document_starts"))
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {name: sample[name].cuda(non_blocking=True) for name in names}
    document_starts = _document_starts(batch.get("tokens")) if args.reset_at_eod else None
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(names) | {"document_starts": document_starts}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return {name: batch.get(name) for name in names} | {"document_starts": document_starts}


def _document_starts(tokens: Tensor | None) -> Tensor:
    """bool [s, b], from the tokens that the first tensor-parallel rank has; Megatron sends them to the first stage's
    other ranks alone."""
    if tokens is None:
        args = get_args()
        starts = torch.empty(args.seq_length, args.micro_batch_size, dtype=torch.bool, device="cuda")
    else:
        starts = starts_of_documents(tokens, get_tokenizer().eod)
    dist.broadcast(starts, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return starts


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: HybridModel
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch; returns the output, and the function that makes it a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with straggler_timer:
        # In the place of an attention mask: see SharedStateStack.forward.
        output = model(batch["tokens"], batch["position_ids"], batch["document_starts"], labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])  # type: ignore[arg-type]  # all have it where it is called


def loss_function(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked tokens' losses, their number, and both for the log.

    Args:
        loss_mask, losses: [b, s] each.
    """
    args = get_args()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    tokens = loss_mask.sum().to(torch.int)
    # A copy: it is compared with a rerun's, and until then the schedule scales the loss in place, and frees it.
    result = loss.detach().clone()
    validate = partial(get_rerun_state_machine().validate_result, result=result, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for test, name in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            validate(rejection_func=test, message=f"{name} in the loss of a micro-batch", fatal=True)
    if args.check_for_spiky_loss:
        spike = partial(get_rerun_state_machine().is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss")
        validate(rejection_func=spike, message="spiky loss", fatal=False)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
