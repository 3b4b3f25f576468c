"""Every test process meets Megatron as an entry script does: the CPU in the GPU's place, then the patches."""

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()
