"""What one rank holds in memory and what it sends, seen where torch dispatches its operations.

For fake tensors and process groups as for real ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that a rank sends in an operation of n ranks into which it puts s bytes. Collectives as rings, which send the
# least that is possible; in a broadcast every rank passes on what it gets.
SENT: dict[str, Callable[[int, int], float]] = {
    "allreduce_": lambda n, s: 2 * (n - 1) / n * s,
    "allreduce_coalesced_": lambda n, s: 2 * (n - 1) / n * s,
    "allgather_": lambda n, s: (n - 1) * s,
    "_allgather_base_": lambda n, s: (n - 1) * s,
    "allgather_into_tensor_coalesced_": lambda n, s: (n - 1) * s,
    "reduce_scatter_": lambda n, s: (n - 1) / n * s,
    "_reduce_scatter_base_": lambda n, s: (n - 1) / n * s,
    "reduce_scatter_tensor_coalesced_": lambda n, s: (n - 1) / n * s,
    "alltoall_": lambda n, s: (n - 1) / n * s,
    "alltoall_base_": lambda n, s: (n - 1) / n * s,
    "broadcast_": lambda n, s: s if n > 1 else 0,
    "send": lambda n, s: s,
    "recv_": lambda n, s: 0,
    "barrier": lambda n, s: 0,
}
_OUTPUTS_FIRST = ("gather", "scatter", "alltoall")  # then the inputs; the others work in place


class Recorder(TorchDispatchMode):
    """While it is entered, follows every new tensor's storage until it is freed, and every message.

    Args:
        kinds: name of a process group -> what to call its traffic; "other" without one. A point-to-point message is
            the pipeline's, "PP", whatever its group.

    Attributes:
        live, peak: bytes of the storages that were made since and exist, and the most there have been.
        sent: kind -> bytes that this rank has sent.
    """

    def __init__(self, kinds: dict[str, str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.live = self.peak = 0
        self.sent: Counter[str] = Counter()
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count_message(func.overloadpacket.__name__, args)
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage(), args)
        return result

    def _follow(self, storage: torch.UntypedStorage, args: Any) -> None:
        key = storage._cdata
        if key not in self._known and key not in storages_of(a for a in tree_leaves(args) if isinstance(a, Tensor)):
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def _count_message(self, name: str, args: Any) -> None:
        if name not in SENT:
            raise NotImplementedError(f"nobody has said yet what a rank sends in c10d.{name}: add it to SENT")
        group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        kind = "PP" if name == "send" else self.kinds.get(group.group_name, "other")
        put_in = args[1] if any(word in name for word in _OUTPUTS_FIRST) else args[0]
        size = sum(t.numel() * t.element_size() for t in tree_leaves(put_in) if isinstance(t, Tensor))
        self.sent[kind] += SENT[name](group.size(), size)  # type: ignore[assignment]  # a float


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage -> bytes; tensors may share one."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
