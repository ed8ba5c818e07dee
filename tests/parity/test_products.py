"""--denoiser-precision and --vae-precision, with a GPU's products emulated: what is rounded, and how far results move.

The emulation reads torch's settings at each product, as cuBLAS and cuDNN do when a kernel is launched, and rounds fp32
factors to TF32's 10 bits of mantissa where they are on. bf16 is computed as on a GPU: factors and results have 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ross_mcore import platform
from ross_mcore.architecture import DenoiserConfig, PixelDecoderConfig
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.diffusion import Schedule, keyed_draws, reconstruction_losses
from ross_mcore.models.pixel_decoder import PixelDecoder
from ross_mcore.models.products import Precision

CONFIG = DenoiserConfig(depth=3, width=64, num_heads=4)
CONDITION, GRID, IMAGES = 24, 4, 4
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CHANNELS = 4 * VAE["latent_channels"]

UNIT_ROUNDOFF = {"fp32": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of rounding to nearest: half of the step 2^-10 (TF32) or 2^-7 (bf16) between numbers."""
IN_A_ROW = 2 + 5 * CONFIG.depth + 1
"""Products one after the other from condition to prediction: both embeddings, (modulation, qkv, proj, fc1, fc2) of each
block, the last layer."""
VAE_IN_A_ROW = 1 + 2 + 1 + 2 + 2 + 4 + 2 + 1 + 1
"""conv_in, a block, a downsampling, a block; of the middle a block, an attention and a block; conv_out, quant_conv."""


def tolerance(products: int, precision: Precision) -> float:
    """The relative error, in the norm of a tensor, after that many products in a row.

    A factor's relative error has the root mean square u / sqrt(3) x sqrt(mean of 1 / m^2 over mantissas m in [1, 2]) =
    0.41 u. The two factors give a term of a product 0.58 u, and a bf16 result that is rounded too 0.71 u. Errors of
    terms are independent, so their sum grows as the sum of terms with random signs does: a product has that relative
    error too. So do sums of independent errors: n products have sqrt(n) of it. The rest, up to u, is for terms that
    cancel more than random ones.
    """
    return products**0.5 * UNIT_ROUNDOFF[precision]


def to_tf32(x: Tensor) -> Tensor:
    """fp32 -> the nearest number with 10 bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@dataclass
class TensorCores(TorchDispatchMode):
    """Emulates a GPU's fp32 products and convolutions; `seen` has the precision of each, in order."""

    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = {"mm": 0, "bmm": 0, "addmm": 1, "convolution": 0}.get(function.overloadpacket.__name__)
        if first is not None:
            setting = torch.backends.cudnn if "conv" in str(function) else torch.backends.cuda.matmul
            factors = args[first : first + 2]
            precision = "bf16" if factors[0].dtype == torch.bfloat16 else "tf32" if setting.allow_tf32 else "fp32"
            self.seen.append(precision)
            if precision == "tf32":
                args = (*args[:first], *(to_tf32(factor) for factor in factors), *args[first + 2 :])
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, scope="module")
def of_a_run() -> Iterator[None]:
    """The settings of a run (platform.initialize_process_group), and then torch's own again."""
    platform.set_tf32(False)
    yield
    torch.backends.cudnn.allow_tf32 = True


def denoiser(precision: Precision, recompute: bool = False) -> Denoiser:
    """All parameters are drawn, also those that start at zero."""
    built = Denoiser(CONFIG, CHANNELS, CONDITION, GRID, precision, recompute)
    generator = torch.Generator().manual_seed(0)
    built.reset_parameters(generator)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return built


def autoencoder(precision: Precision) -> PixelDecoder:
    torch.manual_seed(1)
    return PixelDecoder(PixelDecoderConfig(VAE), [0.5] * 3, [0.5] * 3, 4 * GRID, precision=precision)


@dataclass(frozen=True)
class Computed:
    """posteriors; vm_loss [I]; gradients of the denoiser's weights, and of a layer in fp32 that makes the condition."""

    posteriors: Tensor
    losses: Tensor
    gradients: dict[str, Tensor]
    seen: list[str]


def compute(precision: Precision, recompute: bool = False) -> Computed:
    generator = torch.Generator().manual_seed(2)
    numbers = torch.arange(IMAGES)
    model, vae = denoiser(precision, recompute), autoencoder(precision)
    layer = nn.Linear(CONDITION, CONDITION)  # stands for the language model, which computes in fp32 without --bf16
    with torch.no_grad():
        layer.weight.normal_(std=CONDITION**-0.5, generator=generator)
    pixels = torch.randn(IMAGES, 3, 8, 8, generator=generator)
    states = torch.randn(IMAGES, GRID**2, CONDITION, generator=generator)
    draws = keyed_draws(0, numbers, numbers, CONFIG.draws, vae.latent_shape, GRID)
    with TensorCores() as cores:
        posteriors = vae.posteriors(pixels)
        latents = vae.encode(pixels, draws.posterior_noise)
        losses = reconstruction_losses(model, Schedule.cosine(), layer(states), latents, draws)
        losses.mean().backward()
    trained = {"condition": layer.weight} | dict(model.named_parameters())
    gradients = {name: weight.grad for name, weight in trained.items() if weight.grad is not None}
    return Computed(posteriors, losses.detach(), gradients, cores.seen)


@pytest.fixture(scope="module")
def exact() -> Computed:
    return compute("fp32")


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_losses_and_gradients_move_less_than_the_tolerance(precision: Precision, exact: Computed) -> None:
    """A loss is a mean of n squares: each moves by twice the error of its prediction, and their mean by 1 / sqrt(n) of
    that. A gradient is made of the forward products and as many backward ones, and its own."""
    found = compute(precision)
    squares = CONFIG.draws * CHANNELS * GRID**2
    assert 0 < distance(found.posteriors, exact.posteriors) < tolerance(VAE_IN_A_ROW, precision)
    assert 0 < distance(found.losses, exact.losses) < 2 * tolerance(IN_A_ROW, precision) / squares**0.5
    for name, gradient in found.gradients.items():
        bound = tolerance(2 * IN_A_ROW + 1, precision)
        assert 0 < distance(gradient, exact.gradients[name]) < bound, name


def test_what_is_rounded(exact: Computed) -> None:
    """In forward and backward the products of the part that asks for it, and no others, whatever torch's default is."""
    assert set(exact.seen) == {"fp32"}
    tf32, bf16 = compute("tf32").seen, compute("bf16").seen
    assert len(tf32) == len(exact.seen)
    timesteps = 2 + 3  # two layers, forward and backward
    assert tf32.count("fp32") == bf16.count("fp32") == timesteps + 2  # and the condition's layer
    assert tf32.count("tf32") == bf16.count("bf16") == len(exact.seen) - timesteps - 2
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_recomputed_blocks_give_the_same_bits(exact: Computed) -> None:
    for precision in ("fp32", "bf16"):
        kept, again = (exact if precision == "fp32" else compute(precision)), compute(precision, recompute=True)
        assert torch.equal(kept.losses, again.losses)
        assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in kept.gradients.items())


def test_a_gpu_computes_convolutions_with_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution gets its weight in that order; the stored weights keep theirs. The values are those of torch's
    CPU kernels for it, whose group norm is the less exact one."""
    orders = []

    class Orders(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution" in str(function):
                orders.append(args[1].is_contiguous(memory_format=torch.channels_last))
            return function(*args, **(kwargs or {}))

    vae, pixels = autoencoder("fp32"), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = vae.posteriors(pixels)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    with Orders():
        found = vae.posteriors(pixels)
    assert all(orders[:-1]) and len(orders) == 13
    assert all(weight.is_contiguous() for weight in vae.parameters())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
