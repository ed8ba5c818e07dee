"""Megatron-style model-parallel training of ROSS: encoder -> LLM -> denoiser."""

from ross_mcore import megatron_hook

__version__ = "0.1.0"

megatron_hook.install()
