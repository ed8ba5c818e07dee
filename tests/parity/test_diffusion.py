"""The schedule, loss and sampler against values recorded from the reference's guided-diffusion code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ross_mcore.models.diffusion import Schedule, cosine_betas, epsilon_loss, sample

TABLES = [
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


@pytest.fixture(scope="module")
def tables(recorded):
    return recorded("diffusion_schedule.safetensors")[0]


@pytest.fixture(scope="module")
def toy(recorded):
    return recorded("diffusion_toy.safetensors")[0]


def toy_denoiser(toy, context):
    return lambda x, t: F.conv2d(x, toy["toy_W"], toy["toy_b"]) + context * (t.view(-1, 1, 1, 1).float() / 1000)


@pytest.mark.parametrize("process", ["train", "respaced10"])
def test_tables_are_the_references(tables, assert_close, process):
    """float64 on both sides; 1e-9 because 1 - alphas_cumprod cancels nine digits at the first timestep."""
    schedule = Schedule.cosine() if process == "train" else Schedule.cosine().respace(10)
    assert schedule.timestep_map.tolist() == tables[f"{process}.timestep_map"].tolist()
    for name in TABLES:
        assert_close(name, getattr(schedule, name), tables[f"{process}.{name}"], 1e-9)
    assert_close("base betas", cosine_betas(1000), tables["base_betas_before_respacing"], 1e-12)


def test_training_loss_and_gradients(toy, assert_close):
    schedule = Schedule.cosine()
    weight, bias, context = (toy[name].clone().requires_grad_() for name in ("toy_W", "toy_b", "context"))
    x_t = schedule.q_sample(toy["x0"], toy["t"], toy["noise"])
    assert_close("x_t", x_t, toy["x_t"])
    prediction = toy_denoiser({"toy_W": weight, "toy_b": bias}, context)(x_t, toy["t"])
    assert_close("prediction", prediction, toy["pred_noise"])
    losses = epsilon_loss(prediction, toy["noise"])
    assert_close("loss", losses, toy["loss_per_sample"])
    losses.mean().backward()
    for name, parameter in (("toy_W", weight), ("toy_b", bias), ("context", context)):
        assert_close(f"gradient of {name}", parameter.grad, toy[f"grad_{name}"])


def test_posterior_and_one_step(toy, assert_close):
    schedule = Schedule.cosine()
    mean, variance, log_variance = schedule.posterior(toy["x0"], toy["x_t"], toy["t"])
    assert_close("posterior mean", mean, toy["posterior_mean"])
    assert_close("posterior variance", variance.expand_as(mean), toy["posterior_var"])
    assert_close("posterior log-variance", log_variance.expand_as(mean), toy["posterior_logvar"])
    start = schedule.predict_start(toy["x_t"], toy["t"], toy["pred_noise"])
    assert_close("predicted x_0", start, toy["p_pred_xstart"])
    mean = schedule.posterior(start, toy["x_t"], toy["t"])[0]
    assert_close("step mean", mean, toy["p_mean"])
    variance = schedule.fixed_large_variance.float()[toy["t"]].view(-1, 1, 1, 1)
    assert_close("step variance", variance.expand_as(mean), toy["p_variance"])
    moving = (toy["t"] > 0).view(-1, 1, 1, 1)
    assert_close("step", mean + moving * 0.9 * variance.sqrt() * toy["p_sample_noise"], toy["p_sample"])


def test_ten_step_loop(toy, assert_close):
    """Ten steps from t = 999 multiply by up to 1 / sqrt(alphas_cumprod) = 2e4 and divide again: still within 1e-5."""
    context = toy["context"][: len(toy["loop10_start"])]
    final = sample(
        toy_denoiser(toy, context),
        Schedule.cosine(),
        toy["loop10_start"].shape,
        steps=10,
        start=toy["loop10_start"],
        noises=toy["loop10_noises"],
    )
    assert_close("final", final, toy["loop10_final"])
    assert torch.isfinite(final).all()
