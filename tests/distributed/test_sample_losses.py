"""The losses of a sample do not depend on the other samples of its row and micro-batch; the frozen parts run for the
pictures of several micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_ranks

LENGTHS = [40, 9, 0, 33, 12, 25]
PICTURES = [2, 0, 0, 1, 0, 1]


def compare_with_each_alone(folder: str, tensor_parallel: int) -> None:
    """On each rank: six samples, the third skipped, in two rows of three and one by one."""
    from parity.trial import Layout, prepare, share_of_pixels

    from ross_mcore import platform
    from ross_mcore.batch import Row, Sample
    from ross_mcore.checkpoint.folder import Checkpoint
    from ross_mcore.data.loader import Step
    from ross_mcore.engine import frozen
    from ross_mcore.parallel import groups

    platform.initialize_process_group(timeout_minutes=1)
    checkpoint = Checkpoint(Path(folder) / "iter_0000000", 0)
    trial = prepare(checkpoint, "finetune", Layout(tensor_parallel=tensor_parallel), pack=True)
    vision, random = trial.model_config.vision, torch.Generator().manual_seed(1)
    samples = []
    for number, (length, pictures) in enumerate(zip(LENGTHS, PICTURES)):
        tokens = torch.randint(3, 200, (length,), generator=random)
        starts = [place * (vision.image_tokens + 2) + 1 for place in range(pictures)]
        for start in starts:
            tokens[start : start + vision.image_tokens] = 0
        labels = torch.where((tokens > 0) & (torch.arange(length) % 3 > 0), tokens, -100)
        pixels: list[Tensor | None] = [
            torch.rand(3, vision.image_size, vision.image_size, generator=random) for _ in starts
        ]
        problem = None if length else "nothing in it"
        samples.append(Sample(str(number), 10 + number, tokens, labels, starts, pixels, problem=problem))

    def sums(*micro_batches: list[Row]) -> Tensor:
        mine: list[list[Row]] = []
        for number, rows in enumerate(micro_batches):
            shares = iter(share_of_pixels([sample for row in rows for sample in row], trial.groups, number))
            mine.append([[next(shares) for _ in row] for row in rows])
        slots = [[[sample.tokens.numel() for sample in row] for row in rows] for rows in micro_batches]
        step = Step([], slots, mine, [], {})
        return torch.cat([found.sums for found in trial.engine.losses(trial.engine.agree(step)).kept])

    together = sums([samples[:3], samples[3:]])
    alone = sums(*([[sample]] for sample in samples))

    calls: Counter[str] = Counter()
    model, frozen.PICTURES_ON_CPU = trial.model.first, frozen.PICTURES
    model.pixel_decoder.encode_batch_size = 8  # as on a GPU
    for part in (model.vision_model, model.pixel_decoder.autoencoder.encoder):
        part.register_forward_hook(lambda part, *_: calls.update([type(part).__name__]))
    repeated = sums(*([[samples[3]]] for _ in range(32)))
    groups.destroy()
    # groups of 1, 8, 8, 8 and 7 micro-batches; of two ranks each has every other picture, the second not the first one
    expected = {(1, 0): 5, (2, 0): 5, (2, 1): 4}[tensor_parallel, trial.groups.tensor_rank]
    assert calls == {"VisionModel": expected, "Encoder": expected}
    torch.testing.assert_close(repeated, repeated[:1].expand(32, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (alone[[0, 1, 3, 4, 5]] > 0).all() and (alone[2] == 0).all()
    assert len(set(alone.flatten().tolist())) == 11


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_each_sample_has_its_own_losses(tensor_parallel: int, base: Callable[[str], Path]) -> None:
    """Blank samples are denoised too, as in the reference."""
    run_ranks(compare_with_each_alone, tensor_parallel, str(base("qwen2_siglip")), tensor_parallel)
