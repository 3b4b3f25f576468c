"""Run unmodified Megatron (megatron-core and megatron.training 0.19.2) on a machine without a GPU.

Megatron asks torch.cuda for its device, generator, streams and memory. `install()` answers those questions
for the CPU, so that a model runs over gloo with all of Megatron's parallelism and no collective is emulated.
Where CUDA is available, `install()` returns False and touches nothing.

    from archscale_megatron import cpu
    cpu.install()
    import megatron.core

Call it at the top level of the entry script, outside `if __name__ == "__main__"`: Megatron's checkpoint
worker imports the script again in a fresh process, and needs it there too.
"""

import collections
import contextlib
import functools
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

ACTIVE = False
"""True once `install()` has put the CPU in the place of the GPU."""

CPU = torch.device("cpu")

_NEW_TENSORS = "arange as_tensor empty empty_strided eye full linspace ones rand randint randn randperm tensor zeros"
_NEW_TENSORS_LIKE = "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"


def install() -> bool:
    """Make the CPU answer for the GPU, in this process; a second call does nothing.

    Returns:
        True if the CPU stands in for the GPU, False (with nothing changed) if CUDA is available.
    Raises:
        RuntimeError: Megatron was imported before; parts of it would have looked for a GPU already.
    """
    global ACTIVE
    if ACTIVE or torch.cuda.is_available():
        return ACTIVE
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "archscale_megatron.cpu.install() was called after `import megatron.core`: "
            "call it before the first import of megatron"
        )
    # Megatron wraps its fused functions in torch.compile on import: on a CPU that starts a C++ compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # What Megatron asserts for tensor parallelism on GPUs older than Blackwell (training/arguments.py:1437).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _device()
    _generator()
    _streams()
    _memory()
    _factories()
    _tensors()
    ACTIVE = True
    return True


class Event:
    """`torch.cuda.Event` of a device that finishes each operation before it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: "Stream | None" = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between the two records."""
        return 1e3 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    def wait(self, stream: "Stream | None" = None) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    """`torch.cuda.Stream` with nothing to wait for."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def synchronize(self) -> None: ...


class _Generators:
    """`torch.cuda.default_generators`: the generator of every device is the CPU's."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer(module: Any, names: str, value: Any = None) -> None:
    """Make each function `module.name` return `value`. One new function each: torch._dynamo, which the
    optimizers import, refuses one function under two names."""

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    for name in names.split():
        setattr(module, name, answer(value))


def _device() -> None:
    """One device, the CPU. With none at all, Megatron builds no process groups (initialize.py:331)."""
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=0)
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):  # each has its own name for it
        _answer(module, "current_device", CPU)
    _answer(torch.cuda, "device_count", 1)
    _answer(torch.cuda, "get_device_name", properties.name)
    _answer(torch.cuda, "get_device_properties", properties)
    _answer(torch.cuda, "get_device_capability", (properties.major, properties.minor))
    _answer(torch.cuda, "set_device synchronize check_error")
    _answer(torch.cuda.nvtx, "range_push range_pop")


def _generator() -> None:
    """The CUDA generator is the CPU generator.

    So Megatron's random state tracker, seeds, recompute and checkpointed random states act on the generator
    that draws. torch.cuda's own functions (get_rng_state, set_rng_state, manual_seed, ...) work through these
    two names.
    """
    cuda: Any = torch.cuda
    cuda._initialized = True
    _answer(torch.cuda, "_is_in_bad_fork", False)  # nothing of CUDA's breaks in a forked process
    cuda.default_generators = _Generators()
    # The tracker warns when the CPU generator moves inside a fork of the GPU generator. Here it always does.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _streams() -> None:
    """Each operation finishes before it returns: streams and events order nothing."""
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    _answer(torch.cuda, "current_stream default_stream", Stream())
    _answer(torch.cuda, "set_stream")
    _answer(torch.cuda, "is_current_stream_capturing", False)
    _answer(torch.Tensor, "record_stream")


def _memory() -> None:
    """No GPU memory is ever in use."""
    _answer(torch.cuda, "empty_cache ipc_collect reset_peak_memory_stats")
    _answer(torch.cuda, "memory_allocated max_memory_allocated memory_reserved max_memory_reserved", 0)
    _answer(torch.cuda, "device_memory_used", 0)
    _answer(torch.cuda, "memory_stats", collections.defaultdict(int))
    _answer(torch.cuda, "mem_get_info", (0, 0))


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return function(*args, **kwargs)

    return wrapped


def _factories() -> None:
    """`device="cuda"` means the CPU. Functions, not a TorchFunctionMode: a mode doubles the cost of every
    operation and does not reach the threads of checkpointing."""
    # `with torch.device("meta")` compares what is called with a table of the factories, filled on first use:
    # fill it with the originals, which are what it will see.
    _device_constructors()
    for name in f"{_NEW_TENSORS} {_NEW_TENSORS_LIKE}".split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _tensors() -> None:
    """A tensor or module that moves to the GPU stays where it is; the dtype checks of Megatron's optimizers
    see it there (`param.type() == "torch.cuda.FloatTensor"`, optimizer.py:1009, distrib_optimizer.py:401,
    clip_grads.py:174).
    """
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor_to, tensor_type = tensor.to, tensor.type

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = tensor_type(self)
            return name.replace("torch.", "torch.cuda.", 1) if self.device == CPU else name
        if isinstance(dtype, str):  # the other way round, for x.type(y.type())
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    tensor.to, tensor.type = to, type_
    tensor.cuda = tensor.pin_memory = module.cuda = lambda self, *args, **kwargs: self
