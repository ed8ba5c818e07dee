"""Imported once by the fork server, so that ranks start with everything heavy in memory."""

from ross_mcore import platform

platform.prepare()

import diffusers.models.autoencoders.autoencoder_kl  # noqa: E402, F401
import transformers.models.siglip.modeling_siglip  # noqa: E402, F401

import ross_mcore.training.loop  # noqa: E402, F401
