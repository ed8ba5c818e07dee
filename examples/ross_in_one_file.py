"""ROSS in one process: a vision tower, a projector, a language model, a denoiser, two losses and one optimizer.

The frozen tower turns a picture into features. The projector carries them into the language model, where they take the
place of `<image>` in a chat, and the model learns to answer: lm_loss. Its hidden states at these places then condition
a diffusion transformer that removes noise from a frozen VAE's latents of the same picture: vm_loss, which is low when
the hidden states keep the picture. The demo trains in two stages, the language model only in stage 2 (75 CPU seconds):
    python examples/demo/scenes.py --out runs/scenes && python examples/ross_in_one_file.py --data runs/scenes
The trainer computes the same on many ranks; tests/end_to_end/test_ross_in_one_file.py compares losses and weights.

Legend: B rows of L tokens; D width of the language model; I images of N = g * g tokens, in the order of the rows;
C channels of VAE latents, which are 2g x 2g; M = 4 * I noisy latents, an image's 4 adjacent; W width of the denoiser.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from PIL import Image
from torch import Tensor, nn
from torch.nn import GELU, Linear, ModuleDict, Parameter, Sequential, SiLU
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, optimization

IMAGE, IGNORE = -200, -100  # token at the N places of a picture; label of a token that is not learned
DRAWS, TIMESTEPS, HEADS = 4, 1000, 16  # noisy latents of an image in a step; steps of diffusion; denoiser's heads
STAGES: dict[str, tuple[int, int, dict[str, float]]] = {  # steps; how many warm up; peak rates of what trains
    "pretrain": (350, 11, {"projector": 2e-3, "denoiser": 4e-3}),  # lm_loss ends at 0.002, vm_loss at 0.15
    "finetune": (400, 12, {"projector": 1e-3, "language_model": 1e-3, "denoiser": 4e-3}),  # at 0.004 and 0.12
}
SYSTEM = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
SYSTEM += "detailed, and polite answers to the human's questions. "
TEMPLATES = {"pretrain": ("", "{}", "{}\n"), "finetune": (SYSTEM, "USER: {} ASSISTANT: ", "{}<|im_end|>")}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition: x, condition [M, N, W] -> [M, N, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = ModuleDict({"qkv": Linear(width, 3 * width), "proj": Linear(width, width)})
        self.mlp = ModuleDict({"fc1": Linear(width, 4 * width), "fc2": Linear(4 * width, width)})
        self.adaLN_modulation = Sequential(SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, dim=2)
        qkv = self.attn["qkv"](modulate(x, shift, scale)).unflatten(2, (3, HEADS, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # [M, HEADS, N, W / HEADS]
        x = x + gate * self.attn["proj"](attended.transpose(1, 2).flatten(2))
        inner = F.gelu(self.mlp["fc1"](modulate(x, mlp_shift, mlp_scale)), approximate="tanh")
        return torch.add(x, mlp_gate * self.mlp["fc2"](inner))


class Denoiser(nn.Module):
    """A diffusion transformer with a condition for every token; its weights have the names of a ROSS checkpoint."""

    def __init__(self, channels: int, condition: int, grid: int, width: int, depth: int = 3) -> None:
        super().__init__()
        self.pos_embed = Parameter(get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None])
        self.x_embedder = ModuleDict({"proj": nn.Conv2d(channels, width, kernel_size=1)})
        self.t_embedder = ModuleDict({"mlp": Sequential(Linear(256, width), SiLU(), Linear(width, width))})
        self.z_embedder = Sequential(SiLU(), Linear(condition, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        modulation = Sequential(SiLU(), Linear(width, 2 * width))
        self.final_layer = ModuleDict({"linear": Linear(width, channels), "adaLN_modulation": modulation})
        for name, weight in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or "final" in name:  # blocks add 0, and 0 is predicted
                nn.init.zeros_(weight)
            elif name.startswith(("t_embedder", "z_embedder")):
                nn.init.normal_(weight, std=0.02)
            elif name != "pos_embed":
                nn.init.xavier_uniform_(weight.flatten(1))

    def forward(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """noisy [M, 4C, g, g], timesteps [M], hidden states [M, N, D] -> predicted noise [M, 4C, g, g]."""
        waves = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        condition = self.z_embedder(F.layer_norm(hidden, hidden.shape[-1:])) + self.t_embedder["mlp"](waves)[:, None]
        x = self.x_embedder["proj"](noisy).flatten(2).transpose(1, 2) + self.pos_embed  # [M, N, W]
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=2)
        x = self.final_layer["linear"](modulate(x, shift, scale))  # [M, N, 4C]
        return torch.reshape(x.transpose(1, 2), noisy.shape)


class Ross(nn.Module):
    """The model: tower, language model and VAE from Hugging Face folders in `parts`, projector and denoiser new."""

    def __init__(self, parts: Path, denoiser_width: int) -> None:
        super().__init__()
        self.tower = AutoModel.from_pretrained(parts / "vision_model", dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(parts / "vision_model")
        self.language_model = AutoModelForCausalLM.from_pretrained(parts / "language_model", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(parts / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(parts / "pixel_decoder", low_cpu_mem_usage=False).eval()
        vision, width = self.tower.config, self.language_model.config.hidden_size
        self.grid, self.channels = vision.image_size // vision.patch_size, self.vae.config.latent_channels
        self.projector = Sequential(Linear(vision.hidden_size, width), GELU(), Linear(width, width))
        self.denoiser = Denoiser(4 * self.channels, width, self.grid, denoiser_width)
        left = (torch.linspace(0.008, 1.008, TIMESTEPS + 1, dtype=torch.float64) / 1.008 * torch.pi / 2).cos().square()
        self.signal = (left[1:] / left[:-1]).clamp(min=0.001).cumprod(dim=0)  # [1000]: signal's share of the variance

    def latents(self, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
        """pixels [I, 3, H, W], noise [I, C, 2g, 2g] -> [I, 4C, g, g]: 2 x 2 latents make the one of an image token."""
        config = self.vae.config
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.processor.image_mean, self.processor.image_std))
        images = (2 * (pixels * std + mean) - 1).clamp(-1, 1)
        side = 2 * self.grid * 2 ** (len(config.block_out_channels) - 1)
        posterior = self.vae.encode(F.interpolate(images, size=(side, side), mode="bilinear")).latent_dist
        sampled = posterior.mean + posterior.std * posterior_noise
        return F.pixel_unshuffle((sampled - (config.shift_factor or 0)) * config.scaling_factor, 2)

    def forward(self, tokens: Tensor, labels: Tensor, pixels: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels [B, L], pixels [I, 3, H, W]; draws: posterior noise [I, C, 2g, 2g], timesteps [I, 4], noise
        [I, 4, 4C, g, g] -> lm_loss, vm_loss. Rows end in padding below 0, which causal attention does not see."""
        layers = self.tower(pixels, output_hidden_states=True).hidden_states
        features = self.projector(layers[-2][:, -(self.grid**2) :])  # [I, N, D]; CLIP's class token is left out
        is_image = (tokens == IMAGE)[..., None]  # [B, L, 1]
        embeddings = self.language_model.get_input_embeddings()(tokens.clamp(min=0)).masked_scatter(is_image, features)
        hidden = self.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state  # [B, L, D]
        logits = self.language_model.lm_head(hidden[:, :-1])
        lm_loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        # and now what the language model has made of the pictures
        seen = hidden.masked_select(is_image).view_as(features).repeat_interleave(DRAWS, dim=0)  # [M, N, D]
        clean = self.latents(pixels, draws[0]).repeat_interleave(DRAWS, dim=0)  # [M, 4C, g, g]
        timesteps, noise = draws[1].flatten(), draws[2].flatten(0, 1)
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt().float() * clean + (1 - signal).sqrt().float() * noise
        return lm_loss, F.mse_loss(self.denoiser(noisy, timesteps, seen), noise)


def train(model: Ross, stage: str, batches: Iterable[Any], decay: float = 0) -> Iterator[tuple[float, float]]:
    """Takes one AdamW step on each of the batches (Ross.forward's arguments) and yields its lm_loss and vm_loss."""
    steps, warmup, rates = STAGES[stage]
    groups: list[dict[str, Any]] = []
    model.requires_grad_(False)
    for part, rate in rates.items():
        for name, weight in getattr(model, part).named_parameters():
            weight.requires_grad_(name != "pos_embed" or stage == "pretrain")  # as the reference does
            groups.append({"params": [weight], "lr": rate, "weight_decay": decay if weight.dim() > 1 else 0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for _, batch in zip(range(steps), batches):
        optimizer.zero_grad()
        lm_loss, vm_loss = model(*batch)
        (lm_loss + vm_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1)
        optimizer.step()
        schedule.step()
        yield lm_loss.item(), vm_loss.item()


def read(record: dict[str, Any], folder: Path, stage: str, model: Ross) -> tuple[Tensor, ...]:
    """A LLaVA record about one picture -> tokens [L], labels [L], pixels [3, H, W]."""
    system, *forms = TEMPLATES[stage]
    pieces = [forms[number % 2].format(turn["value"]) for number, turn in enumerate(record["conversations"])]
    is_answer = [number % 2 == 1 for number, piece in enumerate(pieces) for _ in piece]  # for every character
    before, after = (system + "".join(pieces)).split("<image>")
    start, encoded = model.tokenizer(before).input_ids, model.tokenizer(after, return_offsets_mapping=True)
    start += [IMAGE] * model.grid**2
    tokens = torch.tensor(start + encoded.input_ids)
    is_learned = [is_answer[end - 1 - len(after)] for _, end in encoded.offset_mapping]  # of a token's last character
    labels = tokens.where(torch.tensor([False] * len(start) + is_learned), IGNORE)
    return tokens, labels, model.processor(Image.open(folder / record["image"]), return_tensors="pt").pixel_values[0]


def batches(data: Path, stage: str, model: Ross, size: int = 8) -> Iterator[tuple[Tensor, ...]]:
    """Samples of a stage and the random draws of their losses, without end."""
    records, c, g = json.loads((data / f"{stage}.json").read_text()), model.channels, model.grid
    while True:
        samples = [read(records[number], data, stage, model) for number in torch.randint(len(records), (size,))]
        *text, pixels = map(list, zip(*samples))
        tokens, labels = (nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=IGNORE) for x in text)
        draws = torch.randn(size, c, 2 * g, 2 * g), torch.randint(TIMESTEPS, (size, DRAWS))
        yield tokens, labels, torch.stack(pixels), *draws, torch.randn(size, DRAWS, 4 * c, g, g)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pretrain.json, finetune.json and images")
    options = parser.parse_args()
    torch.manual_seed(42)
    model = Ross(Path(__file__).parent / "demo" / "weights", denoiser_width=96)
    for stage, (steps, *_) in STAGES.items():
        for step, losses in enumerate(train(model, stage, batches(options.data, stage, model)), start=1):
            if step == 1 or step % 50 == 0:
                print("{} {:3} of {}: lm_loss {:.3f}, vm_loss {:.3f}".format(stage, step, steps, *losses), flush=True)


if __name__ == "__main__":
    main()
