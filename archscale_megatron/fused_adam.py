"""Adam with the state layout of Transformer Engine's and Apex's FusedAdam, in plain torch.

Megatron's DistributedOptimizer loads a sharded checkpoint only into an optimizer whose `step` lives in the
parameter group and whose state is `exp_avg` and `exp_avg_sq`; torch's own AdamW keeps a `step` tensor for
each parameter. `megatron_patches` puts this class in its place where neither library is installed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), the trajectory of torch.optim.AdamW bit for bit: on a CPU of
    its `foreach=True`, on a GPU of its `fused=True`, which reads and writes each number once.

    Args:
        params: parameters, or groups of them with their own `lr`, `betas`, `eps`, `weight_decay`.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: `param *= 1 - lr * weight_decay` if `adam_w_mode`, else added to the gradient.
        adam_w_mode: AdamW rather than Adam with L2 regularization.
        capturable: CUDA graph capture, which this class does not have.
    Raises:
        ValueError: `capturable` is True.
        TypeError: an option that only the fused kernels have (`--use-precision-aware-optimizer`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs Transformer Engine's FusedAdam: install it or drop the flag")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        # Empty groups do not count: Megatron gives them the step of the others when it saves
        # (optimizer.py:1995).
        if not group["params"]:
            return
        group["step"] = step = group.get("step", 0) + 1
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads: Any = [p.grad for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        update = self._fused_update if _fused_kernel_serves(params + grads) else self._foreach_update
        update(group, step, params, grads, exp_avgs, exp_avg_sqs)

    def _fused_update(self, group: dict[str, Any], step: int, params: Any, *others: Any) -> None:
        kernel: Any = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        options = {name: group[name] for name in ("lr", "weight_decay", "eps")} | {"amsgrad": False, "maximize": False}
        steps = [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)
        kernel(params, *others, [], steps, beta1=group["betas"][0], beta2=group["betas"][1], **options)

    def _foreach_update(
        self, group: dict[str, Any], step: int, params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any
    ) -> None:
        lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        if weight_decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        elif weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))


def _fused_kernel_serves(tensors: list[Any]) -> bool:
    """On one GPU and in one dtype, as Megatron's master weights and their gradients are."""
    return tensors[0].is_cuda and len({(x.device, x.dtype) for x in tensors}) == 1
