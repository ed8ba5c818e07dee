"""Speed of one training step, beside the same model written plainly, and where the time of both goes.

    python benchmarks/step.py            # one and two threads (the mix: one), about seven minutes
    python benchmarks/step.py --quick    # one thread, one turn

Plain is examples/ross_in_one_file.py: Qwen2 and SigLIP of Hugging Face, diffusers' VAE, rows padded to the longest of
their batch, logits at every position, every image's condition repeated for its four draws, torch's AdamW and norm of
gradients. Ours is the engine of a run: online, with the outputs of VAE and tower precomputed, and packed. Both have the
same weights, samples and random draws: before anything is timed their losses agree to 1e-4.

The model is Qwen2 512 x 8 layers, SigLIP 256 x 6 with 256 tokens a picture, a denoiser of width 256, in fp32, stage 2.
A step has four samples of a picture and 128 to 180 text tokens, of which about 75 are labels; ours has them in one row.
`mix` is 16 samples with the lengths of instruction data (benchmarks/packing.py), plain in batches of 4 and of all 16:
the larger a batch, the more of it is padding. Ways run in turn; the least of their times counts: the processor's with
one thread, the clock's with more. Parts are of a profile of one more step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import instruction_lengths
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples")]

import ross_in_one_file as plain_program  # noqa: E402
from counting.model import STEP, TOKENIZER, Sizes, Wanted, opened, write_checkpoint, write_shards  # noqa: E402

from ross_mcore.batch import collate  # noqa: E402
from ross_mcore.commands import precompute  # noqa: E402
from ross_mcore.data.packing import pack  # noqa: E402
from ross_mcore.data.shard_reader import ShardReader  # noqa: E402
from ross_mcore.engine import engine as engine_module  # noqa: E402
from ross_mcore.engine.run import Run  # noqa: E402
from ross_mcore.engine.step import AgreedStep  # noqa: E402

AGREEMENT = 1e-4
RATE, DECAY, BETAS, EPSILON, CLIP = 1e-5, 0.0, (0.9, 0.999), 1e-8, 1.0
PACKED_TOKENS = 2304
"""Of a packed row: the longest text of the mix and a picture."""
PARTS = ("tower", "LLM", "logits and loss", "VAE", "denoiser", "optimizer", "norm and checks", "other")


class Plain:
    """The plain model in stage 2 and its optimizer."""

    def __init__(self, parts: Path, run: Run) -> None:
        self.model = plain_program.Ross(parts, STEP.denoiser_width)
        model = self.model
        first, last = run.engine.model.first, run.engine.model.last
        copied = [weight.detach().clone() for weight in first.vision_projection.parameters()]
        for weight, value in zip(model.projector.parameters(), copied, strict=True):
            weight.data = value
        model.denoiser.load_state_dict({name: value.clone() for name, value in last.denoiser.state_dict().items()})
        model.requires_grad_(False)
        for part in (model.projector, model.language_model, model.denoiser):
            part.requires_grad_(True)
        model.denoiser.pos_embed.requires_grad_(False)
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)

    def losses(self, batches: Sequence[Any], train: bool) -> tuple[float, float]:
        """lm_loss and vm_loss, means over all labels and all images of the batches; with `train` their gradients."""
        labels = sum(count for *_, count, _ in batches)
        images = sum(count for *_, count in batches)
        totals = [0.0, 0.0]
        for *given, own_labels, own_images in batches:
            lm, vm = self.model(*given)
            terms = lm * (own_labels / labels), vm * (own_images / images)
            if train:
                (terms[0] + terms[1]).backward()
            totals = [total + float(term.detach()) for total, term in zip(totals, terms)]
        return totals[0], totals[1]

    def step(self, batches: Sequence[Any]) -> None:
        self.optimizer.zero_grad()
        self.losses(batches, train=True)
        with part("norm and checks"):
            nn.utils.clip_grad_norm_(self.trained, max_norm=CLIP)
        with part("optimizer"):
            self.optimizer.step()


def plain_batches(run: Run, step: AgreedStep, rows: int) -> list[Any]:
    """Arguments of the plain model for all samples of a step, `rows` at a time, and their labels and images."""
    vision = run.model_config.vision
    samples = [s for number in range(step.size.micro_batches) for row in step.rows_of(number) or [] for s in row]
    found = []
    for start in range(0, len(samples), rows):
        own = samples[start : start + rows]
        longest = max(sample.tokens.numel() for sample in own)
        batch = collate([[sample] for sample in own], longest, vision.image_size)
        draws = run.engine.model.last.draws(batch, None, None)
        shape = (len(own), longest)
        tokens, labels = torch.full(shape, -100), torch.full(shape, -100)
        for row, sample in enumerate(own):
            tokens[row, : sample.tokens.numel()] = sample.tokens
            labels[row, : sample.tokens.numel()] = sample.labels
            for begin in sample.image_starts:
                tokens[row, begin : begin + vision.image_tokens] = plain_program.IMAGE
        pixels = (batch.pixels.float() / 255 - 0.5) / 0.5  # the mean and deviation of counting.model
        given = tokens, labels, pixels, draws.posterior_noise, draws.timesteps, draws.noise
        found.append((*given, sum(sample.label_tokens for sample in own), batch.num_images))
    return found


@contextmanager
def part(name: str) -> Iterator[None]:
    with record_function(f"part:{name}"):
        yield


def mark(owner: Any, function: str, name: str) -> Callable[[], None]:
    """Makes a function of an object or module a part of the profile; returns what undoes it."""
    plain, own = getattr(owner, function), function in vars(owner)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return plain(*args, **kwargs)

    setattr(owner, function, marked)
    return (lambda: setattr(owner, function, plain)) if own else (lambda: delattr(owner, function))


def parts_of_plain(plain: Plain) -> list[tuple[Any, str, str]]:
    model = plain.model
    return [
        (model.tower, "forward", "tower"),
        (model.language_model.model, "forward", "LLM"),
        (model.language_model.lm_head, "forward", "logits and loss"),
        (torch.nn.functional, "cross_entropy", "logits and loss"),
        (model.vae, "encode", "VAE"),
        (model.denoiser, "forward", "denoiser"),
    ]


def parts_of_ours(run: Run) -> list[tuple[Any, str, str]]:
    model = run.engine.model.first
    found = [
        (model.language_model, "forward", "LLM"),
        (model.language_model.embedding, "forward", "LLM"),
        (model.language_model, "token_losses", "logits and loss"),
        (model.denoiser, "forward", "denoiser"),
        (engine_module, "apply_gradients", "optimizer"),
        (engine_module, "gradient_norms", "norm and checks"),
        (engine_module, "all_finite", "norm and checks"),
    ]
    found += [(model.vision_model, "forward", "tower")] if hasattr(model, "vision_model") else []
    return found + ([(model.pixel_decoder, "posteriors", "VAE")] if hasattr(model, "pixel_decoder") else [])


def shares(work: Callable[[], None], places: Sequence[tuple[Any, str, str]]) -> dict[str, float]:
    """Milliseconds of each part in one call of `work`, from a profile; a backward operation is its forward's part."""
    undo = [mark(*place) for place in places]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            work()
    finally:
        for one in undo:
            one()
    events = found.events()
    forward: dict[int, str] = {}

    def ancestors(event: Any) -> Iterator[Any]:
        while event is not None:
            yield event
            event = event.cpu_parent

    def of_range(event: Any) -> str | None:
        names = (above.name for above in ancestors(event))
        return next((name.removeprefix("part:") for name in names if name.startswith("part:")), None)

    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            name = of_range(event)
            if name:
                forward.setdefault(event.sequence_nr, name)
    spent: Counter[str] = Counter()
    for event in events:
        name = of_range(event)
        if name is None:
            nodes = (above for above in ancestors(event) if above.name.startswith("autograd::engine::evaluate"))
            node = next(nodes, None)
            name = forward.get(node.sequence_nr, "other") if node is not None else "other"
        spent[name] += event.self_cpu_time_total / 1e3
    return dict(spent)


class Ours:
    """An opened run and its first step, which is trained on again and again."""

    def __init__(self, closing: ExitStack, base: Path, shards: Path, save: Path, **flags: Any) -> None:
        optimizer = {"lr": RATE, "lr_decay_style": "constant", "lr_warmup_iters": 0, "weight_decay": DECAY}
        self.run: Run = closing.enter_context(opened(base, shards, save, clip_grad=CLIP, **optimizer, **flags))
        self.agreed = self.run.engine.read(self.run.loader)
        self.done = 0

    def step(self) -> None:
        """As the loop does: agree on the step that was read, and train on it."""
        self.run.engine.train(self.run.engine.agree(self.agreed.loaded), self.done)
        self.done += 1

    def losses(self) -> tuple[float, float]:
        found = self.run.engine.losses(self.agreed).losses
        return found.lm_loss or 0.0, found.vm_loss or 0.0


def quietly(work: Callable[[], Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if work():
            raise SystemExit(said.getvalue())


def precomputed(base: Path, shards: Path) -> Path:
    out = shards.with_name(shards.name + "_precomputed")
    words = ["--load", base, "--data-path", shards, "--out", out, "--latents", "--features"]
    quietly(lambda: precompute.main([*map(str, words), "--image-aspect-ratio", "pad"]))
    return out


def seconds(ways: dict[str, Callable[[], None]], turns: int, threads: int) -> dict[str, float]:
    """The least time of each way, run in turn after one step to warm up."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began = clock()
            way()
            if turn:
                taken[name].append(clock() - began)
    return {name: min(times) for name, times in taken.items()}


def mix(sizes: Sizes, count: int) -> list[Wanted]:
    """Samples with the lengths of instruction data, half of their text labels; all have a picture."""
    rng = np.random.default_rng(0)
    lengths = instruction_lengths(rng, count, sizes.image_tokens)
    texts = [max(48, int(length) - sizes.image_tokens) for length in lengths]
    return [Wanted(text, max(4, (text - 40) // 2)) for text in texts]


def compare(title: str, ways: dict[str, Callable[[], None]], turns: int, threads: Sequence[int]) -> None:
    for number in threads:
        times = seconds(ways, turns, number)
        plain = [taken for name, taken in times.items() if name.startswith("plain")]
        for name, taken in times.items():
            ratios = " ".join(f"{base / taken:5.2f}x" for base in plain)
            print(f"{title}, {number} thread(s), {name:<24} {taken:6.2f} s  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of every way [%(default)s]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[1 2]")
    parser.add_argument("--mix", type=int, default=16, help="samples of the mix; 0 leaves it out [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one thread, one turn, no mix")
    options = parser.parse_args()
    if options.quick:
        options.turns, options.threads, options.mix = 1, [1], 0
    with tempfile.TemporaryDirectory() as name, ExitStack() as closing:
        folder = Path(name)
        base = write_checkpoint(folder, STEP)
        shutil.copytree(TOKENIZER, folder / "parts" / "tokenizer")
        shards = write_shards(folder / "step", STEP, [Wanted(tokens, 75) for tokens in (128, 145, 163, 180)])
        one_row = {"pack": True, "seq_length": 2048, "global_batch_size": 1, "micro_batch_size": 1}
        online = Ours(closing, base, shards, folder / "run_online", **one_row)
        stored = Ours(closing, base, precomputed(base, shards), folder / "run_stored", **one_row)
        plain = Plain(folder / "parts", online.run)
        given = plain_batches(online.run, online.agreed, 4)
        require_equal(plain.losses(given, train=False), online.losses(), stored.losses())
        ways = {"plain": lambda: plain.step(given), "ours": online.step, "ours, precomputed": stored.step}
        compare("4 samples", ways, options.turns, options.threads)
        torch.set_num_threads(1)
        spent = {
            "plain": shares(ways["plain"], parts_of_plain(plain)),
            "ours": shares(ways["ours"], parts_of_ours(online.run)),
            "precomputed": shares(ways["ours, precomputed"], parts_of_ours(stored.run)),
        }
        for way, found in spent.items():
            total = sum(found.values())
            text = ", ".join(f"{part} {found.get(part, 0.0):.0f}" for part in PARTS)
            own = (found.get("norm and checks", 0.0) + found.get("other", 0.0)) / total
            print(f"parts of a step in ms, {way}: {text}; norm, checks and other {own:.1%}", flush=True)
        if options.mix:
            shards = write_shards(folder / "mix", STEP, mix(STEP, options.mix))
            lengths = ShardReader(shards).samples
            tokens = lengths["text_tokens"].astype(int) + STEP.image_tokens * lengths["image_spans"].astype(int)
            rows = len(pack(tokens, PACKED_TOKENS, key=0))
            packed = {"pack": True, "seq_length": PACKED_TOKENS, "global_batch_size": rows, "micro_batch_size": 1}
            online = Ours(closing, base, shards, folder / "run_mix", **packed)
            stored = Ours(closing, base, precomputed(base, shards), folder / "run_mix_stored", **packed)
            plain = Plain(folder / "parts", online.run)
            fours, whole = (plain_batches(online.run, online.agreed, size) for size in (4, options.mix))
            require_equal(plain.losses(fours, train=False), online.losses(), stored.losses())
            slots = [sum(batch[0].numel() for batch in given) for given in (fours, whole)]
            print(f"mix: {tokens.sum()} tokens in {rows} rows of at most {PACKED_TOKENS}; padded {slots[0]} slots in")
            print(f"batches of 4, {slots[1]} in one; ratios are to plain in batches of 4 and in one")
            ways = {
                "plain, batches of 4": lambda: plain.step(fours),
                "plain, one batch": lambda: plain.step(whole),
                "packed": online.step,
                "packed, precomputed": stored.step,
            }
            compare(f"mix of {options.mix}", ways, max(1, options.turns - 2), options.threads[:1])


def require_equal(plain: tuple[float, float], *ours: tuple[float, float]) -> None:
    """Ends the program unless the losses of all agree."""
    for found in ours:
        for name, expected, value in zip(("lm_loss", "vm_loss"), plain, found):
            if not abs(expected - value) <= AGREEMENT:
                raise SystemExit(f"{name} is {value:.6f}, and {expected:.6f} of the plain model: not the same work")


if __name__ == "__main__":
    main()
