"""Imported once by the fork server, so that ranks start with everything heavy in memory."""

import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
import transformers.models.siglip.modeling_siglip  # noqa: F401

import ross_mcore.training.loop  # noqa: F401
