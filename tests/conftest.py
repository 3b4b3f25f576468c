"""Every test process meets Megatron as an entry script does: the CPU in the GPU's place, then the patches."""

import os
import signal
from collections.abc import Iterator

import pytest

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Megatron notes a model's attention backend in the environment, and refuses another one in later processes; and
    its arguments have SIGTERM save a run, so that processes which were forked later would not end by it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    for kind in ("FLASH", "FUSED", "UNFUSED"):
        os.environ.pop(f"NVTE_{kind}_ATTN", None)
    signal.signal(signal.SIGTERM, handler)
