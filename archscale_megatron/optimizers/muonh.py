"""MuonH: Muon whose updates keep the Frobenius norm of every matrix (arXiv 2603.28743; ArchScale df4e070).

With W a matrix, U the direction of its update and |.| the Frobenius norm:

    W' = W - lr U |W| / |U|
    W <- W' |W| / |W'|

U is Muon's for hidden matrices. In parameter groups whose `algorithm` is `ADAMH` it is Adam's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from emerging_optimizers.utils import fp32_matmul_precision
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from torch import Tensor

ADAMH = "adamh"


class MuonH(TensorParallelMuon):
    """Muon's or Adam's direction, and a step that keeps norms.

    A norm is that of the whole matrix, whatever part of it a tensor-parallel rank holds. Queries, keys and values of a
    fused projection are matrices of their own where Muon has them so (`split_qkv`).

    Args:
        params: as Megatron makes them: 2-D, fp32 or to be replaced by fp32 copies; in groups.
        betas: decay of Adam's moments, in the groups of algorithm `ADAMH`.
        eps: added to the root of Adam's second moment.
        muon: the arguments of `TensorParallelMuon`. Scales of Muon's update have no effect.
    Raises:
        ValueError: a weight decay that is not 0: norms are kept.
    """

    def __init__(
        self, params: Any, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, **muon: Any
    ) -> None:
        if muon.get("weight_decay"):
            raise ValueError(f"MuonH keeps the norm of a matrix: weight decay must be 0, not {muon['weight_decay']}")
        super().__init__(params, **muon | {"weight_decay": 0.0})
        self.betas, self.eps = betas, eps

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        names = ("exp_avg", "exp_avg_sq") if group.get("algorithm") == ADAMH else ("momentum_buffer",)
        for p in group["params"]:
            if not self.state[p] and not (skip_non_grad_params and p.grad is None):
                self.state[p].update({name: torch.zeros_like(p.data) for name in names})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step. The learning rate is relative: the angle by which a matrix turns, in radians, while it is small."""
        if closure is not None:
            raise ValueError("closure is not supported")
        for group in self.param_groups:
            self._init_group(group)
            adam = group.get("algorithm") == ADAMH
            if adam:  # of an empty group as well, which on another pipeline stage is not empty
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    update = self._adam_direction(p, group["step"]) if adam else self._muon_direction(p, group)
                    self._step_of_constant_norm(p, update, group["lr"])

    def _muon_direction(self, p: Any, group: dict[str, Any]) -> Tensor:
        momentum, average = group["momentum"], self.state[p]["momentum_buffer"]
        average.lerp_(p.grad, 1 - momentum)
        direction = p.grad.lerp(average, momentum) if self.nesterov else average
        with fp32_matmul_precision(self.fp32_matmul_prec):
            return self.orthogonalize(p, direction)

    def _adam_direction(self, p: Any, step: int) -> Tensor:
        """Without the factor 1 / (1 - beta1^step), which no norm sees."""
        (beta1, beta2), state = self.betas, self.state[p]
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        return state["exp_avg"] / ((state["exp_avg_sq"] / (1 - beta2**step)).sqrt_() + self.eps)

    def _step_of_constant_norm(self, p: Any, update: Tensor, lr: float) -> None:
        norms = self.norms(p, p)
        scales = lr * norms / self.norms(p, update).clamp_min(torch.finfo(torch.float32).tiny)
        for w, u, scale in zip(self.matrices(p, p), self.matrices(p, update), scales, strict=True):
            w.sub_(u * scale)
        for w, scale in zip(self.matrices(p, p), norms / self.norms(p, p), strict=True):
            w.mul_(scale)

    def matrices(self, p: Any, values: Tensor) -> tuple[Tensor, ...]:
        """This rank's part of each matrix that is fused in `p`, as views of `values`, which has the shape of `p`."""
        if not (self.split_qkv and self.is_qkv_fn(p)):
            return (values,)
        rows = p.qkv_split_shapes  # of queries, keys and values, group after group
        return values.view(-1, sum(rows), values.shape[-1]).split(rows, dim=1)

    def norms(self, p: Any, values: Tensor) -> Tensor:
        """Frobenius norms of the whole matrices of which `matrices` are parts, fp64 [matrices]."""
        # In fp64, where no step's rounding adds up to a drift of the norm.
        norms = torch.stack([torch.linalg.vector_norm(m, dtype=torch.float64) for m in self.matrices(p, values)])
        if self.pg_collection is None or not getattr(p, "tensor_model_parallel", False):
            return norms
        squares = norms.square_()
        expert = getattr(p, "expert_tp", False)
        dist.all_reduce(squares, group=self.pg_collection.expt_tp if expert else self.pg_collection.tp)
        return squares.sqrt_()
