"""Fill of packed rows on the lengths of captions and of instructions, and the gain over padded micro-batches.

    python benchmarks/packing.py

Packed: windows of 16,384 samples through ross_mcore.data.packing, by each of its two rules and by both as used. Padded:
the same samples in random order, one per row, in steps of 128; each row as long as the longest of its step, then of its
micro-batch of 4 rows (over all data-parallel ranks), then the same with the rows of the step dealt by length, as
--no-pack does. `padding` is the share of computed slots without a token, `ahead` the ratio of samples that packed rows
process in the same number of slots: the speed-up if time is proportional to slots.

Lengths are drawn, because the data sets are not available here. Published facts about them:
- captions: 558,128 of LAION, CC and SBU by BLIP in 181 MB of JSON (LLaVA, docs/Data.md), 324 bytes a record, of which
  some 60 are caption; CC3M has 10.3 +- 4.5 tokens a caption (Sharma et al. 2018). Drawn: 14 tokens on average and a
  picture in every one.
- instructions: LLaVA-1.5's 665 thousand (Liu et al. 2023, table of the data mixture), of which 40 thousand are
  ShareGPT's: text only, and cut at 2,048 tokens. The others have a picture; those written by GPT have 1,452 bytes a
  record (229 MB for 157,712; docs/Data.md), and questions about one picture are joined to one record. Drawn: 255
  text tokens on average beside a picture, and about 1,000 without, log-normal. The means of text are estimated from the
  bytes, at 4.3 per token and with the template added; they are not published. --text-tokens changes them.
- a picture is 576 tokens (CLIP ViT-L/14-336) or 729 (SigLIP-384).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.packing import even_shares, longest_first, pack

WINDOW_SAMPLES = 16384
STEP, MICRO_BATCH = 128, 4
INSTRUCTION_TEXT_TOKENS = 255.0


def log_normal(rng: np.random.Generator, count: int, mean: float, spread: float, least: int) -> NDArray[np.int64]:
    """[count] integers of at least `least` with about this mean; spread: deviation of the logarithm."""
    values = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.maximum(np.rint(values), least).astype(np.int64)


def caption_lengths(rng: np.random.Generator, count: int, image_tokens: int) -> NDArray[np.int64]:
    """Tokens [count] of picture and caption."""
    return image_tokens + log_normal(rng, count, mean=14, spread=0.4, least=4)


def instruction_lengths(
    rng: np.random.Generator, count: int, image_tokens: int, text_tokens: float = INSTRUCTION_TEXT_TOKENS
) -> NDArray[np.int64]:
    """Tokens [count] of a conversation, and of its picture in 94% of them; 45 are template and the shortest answer."""
    text_only = rng.random(count) < 40 / 665
    with_picture = image_tokens + log_normal(rng, count, mean=text_tokens, spread=0.8, least=45)
    return np.where(text_only, np.minimum(log_normal(rng, count, mean=1300, spread=0.8, least=45), 2048), with_picture)


MIXES: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.int64]]] = {
    "captions": caption_lengths,
    "instructions": instruction_lengths,
}


def padded(lengths: NDArray[np.int64], rows: int, by_length: bool = False) -> int:
    """Slots of micro-batches of `rows` samples each, as long as their longest; by_length: steps are sorted before."""
    steps = lengths[: lengths.size // STEP * STEP].reshape(-1, STEP)
    dealt = np.sort(steps, axis=1) if by_length else steps
    return rows * int(dealt.reshape(-1, rows).max(1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=float, default=INSTRUCTION_TEXT_TOKENS)
    parser.add_argument("--windows", type=int, default=3)
    options = parser.parse_args()
    print(f"{'tokens':>23s} {'filled':>22s} {'rows planned':>21s}   padding / samples ahead of rows padded to")
    print(
        f"mix          image  mean    row longest first  even  taken  a second   {'the step':>14s}"
        f" {'micro-batch':>14s} {'by length':>14s}"
    )
    for mix, lengths_of in MIXES.items():
        for image_tokens in (576, 729):
            rng = np.random.default_rng(0)
            count = options.windows * WINDOW_SAMPLES
            if mix == "instructions":
                drawn = instruction_lengths(rng, count, image_tokens, options.text_tokens)
            else:
                drawn = lengths_of(rng, count, image_tokens)
            for row_tokens in (2048, 4096, 8192):
                print(line(mix, image_tokens, row_tokens, np.minimum(drawn, row_tokens)))


def line(mix: str, image_tokens: int, row_tokens: int, lengths: NDArray[np.int64]) -> str:
    """One line of the table, for the lengths [n] of whole windows."""
    windows = lengths.reshape(-1, WINDOW_SAMPLES)
    total = int(lengths.sum())
    filled = [
        total / row_tokens / sum(int(rule(window, row_tokens).max()) + 1 for window in windows)
        for rule in (longest_first, even_shares)
    ]
    began = time.perf_counter()
    rows = sum(len(pack(window, row_tokens, number)) for number, window in enumerate(windows))
    seconds = time.perf_counter() - began
    slots = [padded(lengths, STEP), padded(lengths, MICRO_BATCH), padded(lengths, MICRO_BATCH, by_length=True)]
    return (
        f"{mix:12s} {image_tokens:5d} {lengths.mean():5.0f} {row_tokens:6d} {filled[0]:13.1%} {filled[1]:5.1%} "
        f"{total / row_tokens / rows:6.1%} {rows / seconds:9,.0f}   "
        + " ".join(f"{1 - total / each:6.1%} {each / rows / row_tokens:6.2f}x" for each in slots)
    )


if __name__ == "__main__":
    main()
