"""Rows of single parts: diffusion, denoiser, VAE target."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.golden import Golden, GoldenError, Tensors, where_recorded
from parity.rows import Row, compare, compare_exactly, compare_sets, unsupported
from ross_mcore.architecture import DenoiserConfig
from ross_mcore.batch import Draws
from ross_mcore.conversion.huggingface import read_pixel_decoder_config
from ross_mcore.models.denoiser import (
    CONDITION_NORM_EPSILON,
    Denoiser,
    grid_position_embedding,
    layer_norm,
    timestep_frequencies,
)
from ross_mcore.models.diffusion import (
    TRAIN_TIMESTEPS,
    Schedule,
    cosine_betas,
    epsilon_loss,
    reconstruction_losses,
    run_steps,
    sample,
)
from ross_mcore.models.image_tokens import gather
from ross_mcore.models.pixel_decoder import PixelDecoder, group_latents

TABLE_TOLERANCE = 1e-9
"""float64 on both sides, but 1 - alphas_cumprod cancels nine digits at the first timestep."""
SINUSOID_TOLERANCE = 1e-4
"""exp in float32 differs between processors: MKL has one kernel per instruction set. One unit in the last place of a
frequency, 6e-8, is 6e-5 of a cosine at t = 999; the gradient of the weight after it has the same error."""
SINUSOID_PARAMETER = "t_embedder.mlp.0"
TEMPERATURE = 0.9
"""Of the recorded single sampling step."""


def diffusion_rows(golden: Golden) -> Iterator[Row]:
    """All tables of the recorded processes; loss, gradients, posterior and sampler with a toy denoiser."""
    if golden.has("diffusion_schedule.safetensors"):
        tables, _ = golden.tensors("diffusion_schedule.safetensors")
        train = Schedule.cosine()
        for name, recorded in tables.items():
            process, _, table = name.rpartition(".")
            steps = process.removeprefix("respaced")
            schedule = train.respace(int(steps)) if steps != process else train
            if table == "timestep_map":
                yield compare_exactly("diffusion", name, schedule.timestep_map.tolist(), recorded.tolist(), "timesteps")
            else:
                ours = cosine_betas(TRAIN_TIMESTEPS) if not process else _table(schedule, table)
                if ours is None:
                    yield unsupported("diffusion", name, "a table that this trainer does not use")
                else:
                    yield compare("diffusion", name, ours, recorded, TABLE_TOLERANCE)
    if golden.has("diffusion_toy.safetensors"):
        toy, _ = golden.tensors("diffusion_toy.safetensors")
        yield from where_recorded("diffusion", "toy", _toy_rows(toy))


def _table(schedule: Schedule, name: str) -> Tensor | None:
    """A table by its name in the reference; some are derived from ours in one step."""
    end = torch.ones(1, dtype=torch.float64)
    derived = {
        "alphas_cumprod_prev": lambda: torch.cat([end, schedule.alphas_cumprod[:-1]]),
        "alphas_cumprod_next": lambda: torch.cat([schedule.alphas_cumprod[1:], 0 * end]),
        "log_one_minus_alphas_cumprod": lambda: (1 - schedule.alphas_cumprod).log(),
    }
    return derived[name]() if name in derived else getattr(schedule, name, None)


def _toy_rows(toy: Tensors) -> Iterator[Row]:
    schedule = Schedule.cosine()
    weight, bias, context = (toy[name].clone().requires_grad_() for name in ("toy_W", "toy_b", "context"))

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        scaled = timesteps.view(-1, 1, 1, 1).float() / TRAIN_TIMESTEPS
        return F.conv2d(x, weight, bias) + context[: len(x)] * scaled

    x_t = schedule.q_sample(toy["x0"], toy["t"], toy["noise"])
    prediction = denoise(x_t, toy["t"])
    losses = epsilon_loss(prediction, toy["noise"])
    losses.mean().backward()
    mean, variance, log_variance = schedule.posterior(toy["x0"], toy["x_t"], toy["t"])
    start = schedule.predict_start(toy["x_t"], toy["t"], toy["pred_noise"])
    step_mean = schedule.posterior(start, toy["x_t"], toy["t"])[0]
    step_variance = schedule.fixed_large_variance.float()[toy["t"]].view(-1, 1, 1, 1)
    moving = (toy["t"] > 0).view(-1, 1, 1, 1)
    noise = toy["p_sample_noise"]
    with torch.no_grad():
        noises = toy["loop10_noises"]
        loop = run_steps(sample(denoise, schedule.respace(len(noises)), toy["loop10_start"], noises))
    quantities = {
        "x_t": x_t,
        "pred_noise": prediction,
        "loss_per_sample": losses,
        "grad_toy_W": weight.grad,
        "grad_toy_b": bias.grad,
        "grad_context": context.grad,
        "posterior_mean": mean,
        "posterior_var": variance.expand_as(mean),
        "posterior_logvar": log_variance.expand_as(mean),
        "p_pred_xstart": start,
        "p_mean": step_mean,
        "p_variance": step_variance.expand_as(mean),
        "p_logvar": step_variance.log().expand_as(mean),
        "p_sample": step_mean + moving * TEMPERATURE * step_variance.sqrt() * noise,
        "loop10_final": loop,
    }
    for name, ours in quantities.items():
        yield compare("diffusion", f"toy.{name}", ours, toy[name])


def denoiser_rows(golden: Golden) -> Iterator[Row]:
    """Fixed tables, prediction, losses, and the gradient of the condition and of every parameter, on all recorded
    grids."""
    for file in golden.names("denoiser_*.safetensors"):
        tensors, metadata = golden.tensors(file)
        name = file.removesuffix(".safetensors")
        if not metadata.get("module", "").endswith("denoiser_dit"):
            yield unsupported("denoiser", name, f"{metadata.get('module')}: never used by the reference's model")
            continue
        yield from where_recorded("denoiser", name, _denoiser_rows(name, tensors, metadata))


def _denoiser_rows(name: str, tensors: Tensors, metadata: dict[str, str]) -> Iterator[Row]:
    draws = len(tensors["in.t"]) // len(tensors["in.target"])

    def by_image(tiled: Tensor) -> Tensor:
        """The reference's [draws * I, ...], draw after draw -> [I, draws, ...]."""
        return tiled.unflatten(0, (draws, -1)).transpose(0, 1)

    config = DenoiserConfig(
        depth=int(metadata["depth"]), width=int(metadata["width"]), num_heads=int(metadata["num_heads"]), draws=draws
    )
    grid = math.isqrt(int(metadata["n_patches"]))
    denoiser = Denoiser(config, int(metadata["x_channel"]), int(metadata["z_channel"]), grid)
    zero = {key for key, value in denoiser.named_parameters() if not value.any()}
    yield compare_sets(
        "denoiser", f"{name}: zero at start", zero, (key[4:] for key in json.loads(metadata["zero_at_init"])), "names"
    )
    _load(denoiser, {k[len("sd.net.") :]: v for k, v in tensors.items() if k.startswith("sd.net.")}, name)
    positions = grid_position_embedding(config.width, grid)
    yield compare("denoiser", f"{name}: pos_embed", positions, tensors["sd.net.pos_embed"])
    condition = tensors["in.z_hidden"].clone().requires_grad_()
    yield compare("denoiser", f"{name}: ln_pre", layer_norm(condition, CONDITION_NORM_EPSILON), tensors["out.ln_pre"])
    if "out.t_sinusoid" in tensors:
        sinusoid = timestep_frequencies(tensors["in.t"])
        yield compare("denoiser", f"{name}: t_sinusoid", sinusoid, tensors["out.t_sinusoid"], SINUSOID_TOLERANCE)
        yield compare("denoiser", f"{name}: t_embed", denoiser.t_embedder(tensors["in.t"]), tensors["out.t_embed"])
    schedule = Schedule.cosine()
    if "out.x_t" in tensors:
        x_start = tensors["in.target"].repeat(draws, 1, 1, 1)
        x_t = schedule.q_sample(x_start, tensors["in.t"], tensors["in.noise"])
        yield compare("denoiser", f"{name}: x_t", x_t, tensors["out.x_t"])
    predictions = []

    def watched(x: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        predictions.append(denoiser(x, timesteps, hidden))
        return predictions[-1]

    replay = Draws(torch.empty(len(condition), 0), by_image(tensors["in.t"]), by_image(tensors["in.noise"]))
    losses = reconstruction_losses(watched, schedule, condition, tensors["in.target"], replay)
    losses.mean().backward()
    yield compare("denoiser", f"{name}: prediction", predictions[0], by_image(tensors["out.pred"]).flatten(0, 1))
    yield compare("denoiser", f"{name}: losses", losses, by_image(tensors["out.loss_per_sample"]).mean(1))
    yield compare("denoiser", f"{name}: mean loss", losses.mean(), tensors["out.loss_mean"])
    yield compare("denoiser", f"{name}: gradient of the condition", condition.grad, tensors["grad_in.z_hidden"])
    gradients = {key: value.grad for key, value in denoiser.named_parameters() if value.grad is not None}
    fixed = {key[4:] for key in json.loads(metadata["no_grad_params"])}
    trained = {key for key, _ in denoiser.named_parameters()} - fixed
    yield compare_sets("denoiser", f"{name}: parameters with a gradient", gradients, trained, "names")
    for key in sorted(trained & gradients.keys()):
        tolerance = SINUSOID_TOLERANCE if key == f"{SINUSOID_PARAMETER}.weight" else 1e-5
        recorded = tensors[f"grad.net.{key}"]
        yield compare("denoiser", f"{name}: gradient of {key}", gradients[key], recorded, tolerance)


def vae_rows(golden: Golden) -> Iterator[Row]:
    """The denoiser's target from a picture: posterior mode, and a sample with the recorded noise."""
    for file in golden.names("vae_target_*.safetensors"):
        name = file.removesuffix(".safetensors")
        yield from where_recorded("vae target", name, _vae_rows(golden, name, *golden.tensors(file)))


def _vae_rows(golden: Golden, name: str, tensors: Tensors, metadata: dict[str, str]) -> Iterator[Row]:
    decoder = PixelDecoder(
        read_pixel_decoder_config(golden.folder / golden.autoencoder),
        json.loads(metadata["mean"]),
        json.loads(metadata["std"]),
        int(metadata["decode_image_size"]),
    )
    weights = f"{golden.autoencoder}/diffusion_pytorch_model.safetensors"
    _load(decoder.autoencoder, golden.tensors(weights)[0], weights)
    images = tensors["images"]
    with torch.no_grad():
        posterior = decoder.autoencoder.encode(decoder.images_for_encoder(images)).latent_dist
    quantities = {
        "images_vae": decoder.images_for_encoder(images),
        "post_mean": posterior.mean,
        "post_logvar": posterior.logvar,
        "post_std": posterior.std,
        "z_q_mode": decoder.encode(images, None),
        "z_q_sampled": decoder.encode(images, tensors["posterior_noise"]),
        "group_demo_out": group_latents(tensors["group_demo_in"]),
    }
    for key, ours in quantities.items():
        yield compare("vae target", f"{name}: {key}", ours, tensors[key])
    yield compare("vae target", f"{name}: cond_z_4x", _tiled_condition(tensors, metadata), tensors["cond_z_4x"])


def _load(module: nn.Module, state: Tensors, name: str) -> None:
    """Raises GoldenError if the recorded weights do not fit the module."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).splitlines()[-1].split())[:300]
        raise GoldenError(f"the weights in {name} do not fit its sizes: {why}; record them again") from None


def _tiled_condition(tensors: Tensors, metadata: dict[str, str]) -> Tensor:
    """Our condition [I, N, D] in the reference's arrangement: cut from the hidden states and repeated for each draw."""
    hidden, tiled = tensors["cond_hidden"], tensors["cond_z_4x"]
    starts = json.loads(metadata["boi"].replace("None", "null"))
    rows = [row for row, start in enumerate(starts) if start is not None]
    tokens = tiled.shape[-1] * tiled.shape[-2]
    begins = torch.tensor([row * hidden.shape[1] + starts[row] for row in rows])
    condition = hidden.new_zeros(len(hidden), tokens, hidden.shape[-1])
    condition[rows] = gather(hidden.flatten(0, 1)[:, None], begins, tokens)
    return condition.transpose(1, 2).unflatten(2, tiled.shape[-2:]).repeat(len(tiled) // len(hidden), 1, 1, 1)
