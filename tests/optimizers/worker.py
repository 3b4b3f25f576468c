"""Steps of Muon and MuonH on the parts of matrices that the ranks of a tensor-parallel group hold.

torchrun --nproc-per-node 2 -m tests.optimizers.worker FILE

Rank 0 writes FILE: `OPTIMIZER.TP.STEP.NAME` are the whole matrices, for a tensor-parallel size of 1 and of 2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, LR, WEIGHT_DECAY, BETAS, EPS = 4, 0.02, 0.1, (0.9, 0.95), 1e-8
COLUMN_OF_ADAM = "adamh"  # whose parameter group is that


@dataclass(frozen=True)
class Matrix:
    """A whole parameter; `dim` is the one that is split, `rows` those of each matrix of a fused one, of all ranks,
    `groups` how many times they follow each other."""

    shape: tuple[int, int]
    dim: int | None = None
    rows: tuple[int, ...] = ()
    groups: int = 1


MATRICES = {
    "column": Matrix((24, 10), 0),
    "row": Matrix((12, 20), 1),
    "replicated": Matrix((6, 16)),
    "qkv": Matrix((4 * (6 + 3 + 3), 10), 0, (6, 3, 3), groups=4),
    "blocks": Matrix((8 + 8 + 2, 10), 0, (8, 8, 2)),  # each rank has half of each
    COLUMN_OF_ADAM: Matrix((14, 8), 0),
}


def initial(name: str) -> Tensor:
    return _draw(name, 0) * 0.3


def gradient(name: str, step: int) -> Tensor:
    return _draw(name, 1 + step)


def _draw(name: str, number: int) -> Tensor:
    seed = 1000 * list(MATRICES).index(name) + number
    return torch.randn(MATRICES[name].shape, generator=torch.Generator().manual_seed(seed))


def shard(name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    matrix = MATRICES[name]
    if matrix.dim is None:
        return whole
    blocks = whole.split(matrix.rows, 0) if name == "blocks" else [whole]
    return torch.cat([block.chunk(tp, matrix.dim)[rank] for block in blocks], matrix.dim).contiguous()


def join(name: str, shards: list[Tensor]) -> Tensor:
    matrix = MATRICES[name]
    if matrix.dim is None:
        assert all(torch.equal(part, shards[0]) for part in shards), f"{name}: copies differ"
        return shards[0]
    if name != "blocks":
        return torch.cat(shards, matrix.dim)
    blocks = zip(*(part.split([rows // len(shards) for rows in matrix.rows]) for part in shards), strict=True)
    return torch.cat([part for block in blocks for part in block])


def parameters(tp: int, rank: int) -> dict[str, Any]:
    """As Megatron's layers mark them."""
    result: dict[str, Any] = {}
    for name, matrix in MATRICES.items():
        result[name] = p = nn.Parameter(shard(name, initial(name), tp, rank))
        p.tensor_model_parallel = matrix.dim is not None
        p.partition_dim = -1 if matrix.dim is None else matrix.dim
        if matrix.rows:
            p.is_qkv, p.qkv_split_shapes = True, [r // tp if name == "blocks" else r for r in matrix.rows]
    return result


def optimizer_of(kind: str, ours: dict[str, Any], group: Any) -> Any:
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    from archscale_megatron.optimizers.arguments import muon_arguments
    from archscale_megatron.optimizers.muonh import ADAMH, MuonH

    muon = {name.removeprefix("muon_"): value for name, value in muon_arguments().items()}
    muon |= {"lr": LR, "fp32_matmul_prec": "highest", "split_qkv": True}
    muon["is_qkv_fn"] = lambda p: getattr(p, "is_qkv", False)
    muon["pg_collection"] = SimpleNamespace(tp=group, expt_tp=group, gtp_remat=None, expt_gtp_remat=None)
    matrices = [p for name, p in ours.items() if name != COLUMN_OF_ADAM]
    if kind == "muon":
        return TensorParallelMuon(matrices, weight_decay=WEIGHT_DECAY, **muon)
    groups = [{"params": matrices}, {"params": [ours[COLUMN_OF_ADAM]], "algorithm": ADAMH}, {"params": []}]
    return MuonH(groups, betas=BETAS, eps=EPS, **muon)


def train(kind: str, group: Any) -> dict[str, Tensor]:
    """The whole matrices after each step, on every rank."""
    tp, rank = group.size(), group.rank()
    ours = parameters(tp, rank)
    optimizer = optimizer_of(kind, ours, group)
    result: dict[str, Tensor] = {}
    for step in range(STEPS):
        for name, p in ours.items():
            p.grad = shard(name, gradient(name, step), tp, rank)
        optimizer.step()
        for name, p in ours.items():
            shards = [torch.empty_like(p) for _ in range(tp)]
            dist.all_gather(shards, p.detach(), group)
            result[f"{kind}.{tp}.{step}.{name}"] = join(name, shards).contiguous()
    return result


def main(file: str) -> None:
    from safetensors.torch import save_file

    dist.init_process_group("gloo")
    result: dict[str, Tensor] = {}
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for kind in ("muon", "muonh"):
        result |= train(kind, alone) | train(kind, dist.group.WORLD)
    if dist.get_rank() == 0:
        save_file(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
