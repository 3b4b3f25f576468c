"""Sweeps, scaling laws and what a run will cost: `python -m archscale_megatron.scaling`."""
