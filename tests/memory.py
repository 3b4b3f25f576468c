"""What tensors a piece of code makes."""

from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryRecorder(TorchDispatchMode):
    """Within it, every operation, of backward passes too, tells of the memory behind what it returns.

    Storages of less than `at_least` bytes are not counted.

    Attributes:
        largest: bytes of the largest storage.
        peak: most bytes that were alive at once.
    """

    def __init__(self, at_least: int = 1 << 16) -> None:
        super().__init__()
        self.at_least = at_least
        self.largest = self.peak = 0
        # A weak reference keeps the address from being used again, but not the memory.
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: UntypedStorage) -> None:
        if storage.nbytes() < self.at_least or storage._cdata in self._alive:
            return
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
