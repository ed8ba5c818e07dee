"""Speed of greedy answers, beside `generate` of transformers with the same weights and prompts.

    python benchmarks/generation.py            # two sizes, one and eight prompts
    python benchmarks/generation.py --profile  # where our time goes, too

Both go from texts to texts: tokenize, run the prompts, one token after the other with a key-value cache, decode.
Prompts are of different lengths; transformers pads them on the left. The answers must be equal, token by token. One
thread in fp32; the two ways run in turn, and the least processor time of each counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from counting.model import STEP, WORDS, Sizes, write_checkpoint  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel  # noqa: E402

import ross_mcore  # noqa: E402
from ross_mcore.data.spec import SampleSpec  # noqa: E402
from ross_mcore.data.templates import write_prompt  # noqa: E402

DEMO = Sizes(128, 256, 3, 4, 2, 512, 32, 3, 56, 64, (8, 8))
SIZES = {"512 x 8 layers": STEP, "128 x 3 layers, as the demo's": DEMO}
TEMPLATE = "qwen_2"


def texts(count: int) -> list[str]:
    """Questions of different lengths."""
    return [" ".join(WORDS[(3 * n + i) % len(WORDS)] for i in range(20 + 13 * n % 60)) for n in range(count)]


def with_transformers(
    model: PreTrainedModel, trained: ross_mcore.TrainedModel, asked: list[str], new_tokens: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of answers of exactly `new_tokens` tokens."""
    tokenizer = trained.tokenizer
    spec = SampleSpec(TEMPLATE)
    prompts = [write_prompt([{"from": "human", "value": text}], 0, spec, generation=True) for text in asked]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_token_id
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.batch_decode(ids, skip_special_tokens=True)


def with_ours(trained: ross_mcore.TrainedModel, asked: list[str], new_tokens: int) -> tuple[list[list[int]], list[str]]:
    questions = [ross_mcore.Question(text) for text in asked]
    answers = ross_mcore.generate(trained, questions, ross_mcore.Sampling(new_tokens), template=TEMPLATE)
    return [list(answer.tokens) for answer in answers], [answer.text for answer in answers]


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def compare(name: str, sizes: Sizes, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = write_checkpoint(Path(folder), sizes)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "parts" / "language_model", dtype=torch.float32)
        trained = ross_mcore.load_model(base)
    model.eval()
    for count in (1, 8):
        asked = texts(count)
        ours = partial(with_ours, trained, asked, options.new_tokens)
        theirs = partial(with_transformers, model, trained, asked, options.new_tokens)
        mine = ours()[0]
        if mine != theirs()[0]:
            raise SystemExit(f"{name}, batch {count}: the answers differ")
        times = [(seconds(ours), seconds(theirs)) for _ in range(options.repeats)]
        own, other = (min(column) for column in zip(*times, strict=True))
        tokens = sum(map(len, mine))
        print(
            f"{name}, batch {count}: {tokens / own:6.0f} tokens/s, transformers {tokens / other:6.0f}, "
            f"ratio {other / own:.2f}",
            flush=True,
        )
        if options.profile:
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                ours()
            print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in SIZES.items():
        compare(name, sizes, options)


if __name__ == "__main__":
    main()
