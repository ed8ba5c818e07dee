"""Imported once by the fork server, so that ranks start with the slow imports done."""

import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
import transformers.models.siglip.modeling_siglip  # noqa: F401

import ross_mcore.training.loop  # noqa: F401
