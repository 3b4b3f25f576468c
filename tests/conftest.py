"""Every test process meets Megatron as an entry script does: the CPU in the GPU's place, then the patches."""

import os
from collections.abc import Iterator

import pytest

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()


@pytest.fixture(autouse=True)
def no_attention_backend_in_the_environment() -> Iterator[None]:
    """Megatron notes a model's attention backend in the environment, and refuses another one in later processes."""
    yield
    for kind in ("FLASH", "FUSED", "UNFUSED"):
        os.environ.pop(f"NVTE_{kind}_ATTN", None)
