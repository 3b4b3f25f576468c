"""Pretraining of hybrid-architecture language models on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
