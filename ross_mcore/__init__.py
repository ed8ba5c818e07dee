"""Megatron-style model-parallel training of ROSS: encoder -> LLM -> denoiser."""

__version__ = "0.1.0"
