"""The whole model; each rank builds only the parts of its pipeline stage.

Legend: T tokens of the micro-batch, its rows one after the other, N samples in them, D hidden size, I images, J images
of this tensor-parallel rank's share, K blank samples, L images and blank samples of which it denoises draws. Hidden
states are [T, 1, D], or this rank's piece of the T tokens under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from ross_mcore import platform
from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.batch import Batch, Draws, normalised_pixels, pixel_table
from ross_mcore.models import diffusion, image_tokens
from ross_mcore.models.attention import packed_sequence
from ross_mcore.models.cache import KeyValueCache
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.language import Execution, LanguageModel, transformer_config
from ross_mcore.models.pixel_decoder import PixelDecoder, sample_latents
from ross_mcore.models.projector import VisionProjection
from ross_mcore.models.vision import VisionModel
from ross_mcore.parallel import split
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import Chunk, PairShare, share_of
from ross_mcore.parts import PARTS

LATENT_BOUND = 4.0
"""Limit of sampled latents, after the VAE's scaling, which gives those of FLUX unit variance."""

Reconstructing: TypeAlias = Generator[tuple[int, Tensor], None, tuple[Tensor, Tensor]]
"""Yields each step's timestep and estimate of the latents; returns (originals, reconstructions). diffusion.run_steps"""


@dataclass(frozen=True)
class RossOptions:
    """Options of a model that are not in its architecture.

    seed: of the denoiser's random draws (diffusion.keyed_draws); train_vision: whether the tower trains; precomputed:
    parts whose outputs come in `Batch.parts`, so their modules are not built; blank_posterior [2, C, h, w]: of the
    blank picture, for blank samples with precomputed latents; decodes: build the VAE in any case, for
    `RossModel.reconstruct`.
    """

    seed: int = 0
    train_vision: bool = False
    precomputed: Precomputed = NOTHING_PRECOMPUTED
    blank_posterior: Tensor | None = None
    decodes: bool = True


class RossModel(MegatronModule):
    """Vision tower and projector on the first stage, decoder layers on all, denoiser and VAE on the last.

    `forward` returns the hidden states for the next stage. On the last stage it returns, with `output="losses"`, the
    sums [N, 2 + 2R] of every sample, (cross-entropy over its labels, reconstruction loss over its images; and, for each
    of the R = TIMESTEP_RANGES, the losses of its draws there and their number, without a gradient), in float64 so that
    the order in which they are added does not matter; with `output="hidden"`, the hidden states [T, 1, D] after the
    final norm, all of them on every tensor-parallel rank.
    """

    blank_posterior: Tensor | None

    def __init__(
        self,
        model: ModelConfig,
        groups: Groups,
        execution: Execution,
        chunk: Chunk,
        options: RossOptions = RossOptions(),  # noqa: B008  frozen
    ) -> None:
        """Builds the parts of `chunk`, on this process's device."""
        super().__init__(config=transformer_config(model.language, groups, execution))
        self.model, self.groups, self.options = model, groups, options
        self.model_type = ModelType.encoder_or_decoder  # read by mcore's schedules
        self.pre_process, self.post_process = chunk.is_first, chunk.is_last
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        width = model.language.hidden_size
        precomputed = options.precomputed
        # in the order of the forward pass, which is the order in which mcore gathers weights and reduces gradients
        if chunk.is_first:
            if not precomputed.features:
                self.vision_model = VisionModel(model.vision, options.train_vision, execution.dtype)
            self.vision_projection = VisionProjection(model.projector, model.vision.hidden_size, width).to(
                execution.dtype
            )
        self.language_model = LanguageModel(model.language, self.config, groups, execution, chunk)
        if chunk.is_last and model.denoiser and model.pixel_decoder:
            # stored like the other parts, but computed in a precision of its own (reference ross_arch.py:466-512)
            channels, grid = model.pixel_decoder.token_channels, model.vision.grid
            how = execution.denoiser_precision, execution.recompute.denoiser
            self.denoiser = Denoiser(model.denoiser, channels, width, grid, *how)
            self.denoiser.to(execution.dtype)
            self.schedule = diffusion.Schedule.cosine(platform.device())
            self.autoencoder_config = model.pixel_decoder
            if options.decodes or not precomputed.latents:
                self.pixel_decoder = PixelDecoder(
                    model.pixel_decoder,
                    model.vision.image_mean,
                    model.vision.image_std,
                    model.decode_image_size,
                    precision=execution.vae_precision,
                )
            self.register_buffer("blank_posterior", options.blank_posterior, persistent=False)
        table = pixel_table(model.vision.image_mean, model.vision.image_std)
        self.register_buffer("pixel_table", table, persistent=False)
        self.to(platform.device())
        for part in PARTS:
            if part.splits_images and hasattr(self, part.prefix):
                split.average_over_tensor_group(getattr(self, part.prefix))

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Sets the hidden states of the previous stage; called by mcore's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight of this stage, for mcore's gradient sum over the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> TransformerBlock:
        """The decoder layers; mcore's schedules set the number of the micro-batch on them."""
        return self.language_model.decoder

    def forward(
        self,
        batch: Batch | None,
        segments: Sequence[int],
        output: Literal["losses", "hidden"] = "losses",
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Runs one micro-batch through this stage; middle stages take no batch.

        `segments`: lengths of the runs of tokens that attend to each other (batch.segments), whose keys and values go
        into `cache`, for models/decoding.py. Raises ValueError when a
        batch is missing, or its draws for the losses of a model with a denoiser.
        """
        if (self.pre_process or self.post_process) and batch is None:
            raise ValueError("the first and the last pipeline stage need the batch")
        if batch is not None:
            self.add_parts([batch], output)
        hidden = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self._embed(batch) if self.pre_process and batch is not None else None,
            packed_seq_params=packed_sequence(segments, cache),
        )
        if not self.post_process or batch is None:
            return hidden
        if self.config.sequence_parallel:
            # the gradient is complete on every rank, so backward takes this rank's piece without a reduction
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if output == "hidden":
            return hidden
        return torch.cat([self._lm_sums(hidden, batch)[:, None], self._vm_sums(hidden, batch)], dim=1)

    @torch.no_grad()
    def add_parts(self, batches: Sequence[Batch], output: Literal["losses", "hidden"] = "losses") -> None:
        """Adds the outputs of the frozen tower and of the VAE to `Batch.parts`, as if they were precomputed.

        Each runs once for the pictures of all batches, which are on the device. Batches that have the parts stay as
        they are; so do all where the tower trains, and for the VAE where `output` does not need it.
        """
        frozen: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.pre_process and not self.options.precomputed.features and not self.options.train_vision:
            frozen["features"] = lambda pixels: self.vision_model(pixels.to(self.config.params_dtype))
        if self.post_process and self.model.denoiser and not self.options.precomputed.latents and output == "losses":
            frozen["latents"] = self.pixel_decoder.posteriors
        lacking = [batch for batch in batches if len(batch.pixels) and not frozen.keys() <= batch.parts.keys()]
        if not lacking:
            return
        pixels = normalised_pixels(torch.cat([batch.pixels for batch in lacking]), self.pixel_table)
        for kind, run in frozen.items():
            found = run(pixels).split([len(batch.pixels) for batch in lacking])
            for batch, part in zip(lacking, found, strict=True):
                batch.parts[kind] = part

    def draws(self, batch: Batch, seed: int | None = None, recorded: Draws | None = None) -> Draws | None:
        """The draws of the images and blank samples of which this rank denoises some, on the CPU.

        They are `keyed_draws` of `seed`, by default the model's, or taken from `recorded` ones of all I images and K
        blank samples. None where nothing is denoised. Reads only fields of the batch that are on the host.
        """
        if not self.post_process or self.model.denoiser is None:
            return None
        count = self.denoiser.config.draws if recorded is None else recorded.timesteps.shape[1]
        mine = self._pairs(batch, count).pictures
        if recorded is not None:
            return recorded[slice(mine.start, mine.stop)]
        return diffusion.keyed_draws(
            self.options.seed if seed is None else seed,
            _part(torch.cat([batch.image_positions, batch.blank_positions]), mine),
            _part(torch.cat([batch.image_ordinals, torch.zeros_like(batch.blank_positions)]), mine),
            count,
            self.model.latent_shape,
            self.denoiser.grid,
        )

    def _share(self, batch: Batch) -> range:
        """This tensor-parallel rank's share of the I images."""
        return share_of(batch.num_images, self.groups.tensor_rank, self.groups.tensor.size(), batch.turn)

    def _pairs(self, batch: Batch, draws: int) -> PairShare:
        """This tensor-parallel rank's share of the draws of the I images and, behind them, the K blank samples."""
        pictures = batch.num_images + batch.blank_positions.numel()
        return PairShare.of(pictures, draws, self.groups.tensor_rank, self.groups.tensor.size(), batch.turn)

    def _embed(self, batch: Batch) -> Tensor:
        """Token embeddings with image features spliced in: [T, 1, D], or this rank's piece of it."""
        # without images tower and projector run too, so that their gradients are zero and not missing
        projected = self.vision_projection(self._features(batch, self.config.params_dtype))
        embeddings = self.language_model.embedding(input_ids=batch.tokens[None], position_ids=None)
        projected = split.gather_shares(projected, batch.num_images, self.groups.tensor, batch.turn)
        embeddings = image_tokens.splice(embeddings, projected, batch.image_starts)
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def _pixels(self, batch: Batch) -> Tensor:
        """[J, 3, H, W] float32 in the tower's normalisation."""
        return normalised_pixels(batch.pixels, self.pixel_table)

    def _features(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """The tower's features [J, N, Dv] of this rank's share of the images."""
        if self.options.train_vision and not self.options.precomputed.features:
            return self.vision_model(self._pixels(batch).to(dtype))
        empty = torch.zeros(0, *self.model.feature_shape, device=batch.pixels.device)
        return batch.parts.get("features", empty).to(dtype)

    def _posteriors(self, batch: Batch) -> Tensor:
        """The VAE's posteriors [J, 2, C, h, w] float32 of this rank's share of the images."""
        empty = torch.zeros(0, 2, *self.model.latent_shape, device=batch.pixels.device)
        return batch.parts.get("latents", empty).float()

    def _latents(self, batch: Batch, places: range, noise: Tensor) -> Tensor:
        """Latent tokens [L, 4C, g, g] of some of the I images and, behind them, K pictures of the mean colour.

        noise [L, C, h, w]. Each rank encodes its share of the images; where that differs from the images of which it
        denoises draws, the ranks exchange their shares.
        """
        images, blanks = batch.num_images, batch.blank_positions.numel()
        posteriors = self._posteriors(batch)
        if images and (blanks or images % self.groups.tensor.size()):
            gathered = split.gather_shares(posteriors, images, self.groups.tensor, batch.turn)
            posteriors = gathered[places.start : places.stop]
        if missing := len(places) - len(posteriors):
            blank = self._blank_posterior(batch).float()
            posteriors = torch.cat([posteriors, blank.expand(missing, -1, -1, -1, -1)])
        return sample_latents(posteriors, noise, self.autoencoder_config)

    def _blank_posterior(self, batch: Batch) -> Tensor:
        """[2, C, h, w]; computed once, because the VAE is frozen."""
        if self.blank_posterior is None and not self.options.precomputed.latents:
            size = self.model.vision.image_size
            blank = torch.zeros(1, 3, size, size, device=batch.pixels.device)
            self.blank_posterior = self.pixel_decoder.posteriors(blank)[0]
        if self.blank_posterior is None:
            raise ValueError("the posterior of a blank picture is needed and was not given")
        return self.blank_posterior

    def _lm_sums(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum of the cross-entropies over the labels of each sample, [N]; logits are computed at labels only."""
        states = hidden.index_select(0, batch.label_positions).squeeze(1)
        losses = self.language_model.token_losses(states, batch.label_targets)
        return _sums_by_sample(losses * batch.label_weights, batch.label_samples, batch)

    def _vm_sums(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Sums of each sample [N, 1 + 2R], equal on all tensor-parallel ranks: the reconstruction losses of its images,
        and by ranges of timesteps.

        Each tensor-parallel rank computes its share of the (image, draw) pairs. A blank sample counts as one picture of
        the mean colour (zero in normalised space) with condition zero, as in the reference (ross_arch.py:466-512).
        """
        if self.model.denoiser is None:
            return hidden.new_zeros(batch.num_samples, 1 + 2 * diffusion.TIMESTEP_RANGES, dtype=torch.float64)
        if batch.draws is None:
            raise ValueError("the reconstruction loss needs the batch's draws")
        share = self._pairs(batch, batch.draws.timesteps.shape[1])
        latents = self._latents(batch, share.pictures, batch.draws.posterior_noise)
        # of the states' gradients, those at images are summed over the ranks, and no others are sent
        condition = image_tokens.gather(hidden, batch.image_starts, self.model.vision.image_tokens)
        # a rank without pairs runs the denoiser on an empty batch: its gradients are zero, and no rank waits
        condition = _part(split.enter_share(condition, self.groups.tensor), share.pictures)
        blanks = len(share.pictures) - len(condition)
        condition = torch.cat([condition, condition.new_zeros(blanks, *condition.shape[1:])])
        denoise = partial(self.denoiser, draws_of_each=share.draws_of_each)
        losses = diffusion.pair_losses(denoise, self.schedule, condition, latents, batch.draws, share.pairs)
        owners = _part(torch.cat([batch.image_samples, batch.blank_samples]), share.pictures)
        of_images = diffusion.mean_over_draws(losses, batch.draws, share.pairs)
        of_pairs = diffusion.by_timestep(losses.detach(), _part(batch.draws.timesteps.flatten(), share.pairs))
        owners_of_pairs = _part(owners.repeat_interleave(batch.draws.timesteps.shape[1]), share.pairs)
        sums = [
            _sums_by_sample(of_images, owners, batch)[:, None],
            _sums_by_sample(of_pairs.flatten(1), owners_of_pairs, batch),
        ]
        return split.sum_shares(torch.cat(sums, dim=1), self.groups.tensor)

    @torch.no_grad()
    def reconstruct(
        self,
        hidden: Tensor,
        batch: Batch,
        *,
        steps: int = 50,
        temperature: float = 1.0,
        seed: int | None = None,
        start_timestep: int | None = None,
    ) -> Reconstructing:
        """Reconstructs this rank's images from their hidden states, on the last stage, a step at a time.

        hidden [T, 1, D] from `forward(output="hidden")` -> (originals, reconstructions), both [J, 3, Hd, Hd] in [0, 1].
        The denoiser samples latents in `steps` steps, and the VAE decodes them. The noise of an image depends on (seed,
        position, ordinal) only, so its reconstruction is the same in every layout; `seed` is by default the model's.

        Sampling starts at pure noise, or with `start_timestep` t (0 to 999) at the image's own latents noised to t; it
        then has at most t + 1 steps. Raises ValueError for numbers out of range.
        """
        mine = self._share(batch)
        condition = image_tokens.gather(hidden, _part(batch.image_starts, mine), self.model.vision.image_tokens)
        shape = (self.denoiser.in_channels, self.denoiser.grid, self.denoiser.grid)
        chosen = self.options.seed if seed is None else seed
        generators = [
            torch.Generator().manual_seed(diffusion.draw_seed(chosen, position, ordinal))
            for position, ordinal in zip(
                _part(batch.image_positions, mine).tolist(), _part(batch.image_ordinals, mine).tolist(), strict=True
            )
        ]

        def draw() -> Tensor:
            drawn = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(drawn) if drawn else torch.zeros(0, *shape)

        schedule, start = self.schedule.respace(steps, start_timestep), draw().to(hidden.device)
        if start_timestep is not None:
            timesteps = torch.full((len(start),), start_timestep, dtype=torch.int64, device=start.device)
            start = self.schedule.q_sample(self._mean_latents(batch), timesteps, start)
        latents = yield from diffusion.sample(
            lambda x, timesteps: self.denoiser(x, timesteps, condition),
            schedule,
            start,
            (draw() for _ in range(schedule.num_timesteps)),
            temperature=temperature,
            clip=LATENT_BOUND,
        )
        if self.options.precomputed.latents:  # pixels may not be read; the VAE decodes the stored mean
            return self.pixel_decoder.decode(self._mean_latents(batch)), self.pixel_decoder.decode(latents)
        originals = self.pixel_decoder.images_for_encoder(self._pixels(batch)) / 2 + 0.5
        return originals, self.pixel_decoder.decode(latents)

    def _mean_latents(self, batch: Batch) -> Tensor:
        """Latent tokens [J, 4C, g, g] of this rank's images: the means of their posteriors."""
        is_stored = self.options.precomputed.latents
        posteriors = self._posteriors(batch) if is_stored else self.pixel_decoder.posteriors(self._pixels(batch))
        return sample_latents(posteriors, None, self.autoencoder_config)


def _part(values: Tensor, places: range) -> Tensor:
    """The values at consecutive places."""
    return values[places.start : places.stop]


def _sums_by_sample(losses: Tensor, owners: Tensor, batch: Batch) -> Tensor:
    """losses [M, ...], owners [M] (the sample of each loss) -> float64 sums [N, ...]; differentiable."""
    zeros = losses.new_zeros(batch.num_samples, *losses.shape[1:], dtype=torch.float64)
    return zeros.index_add(0, owners, losses.double())
