"""Make the demo's tokenizer: a byte-level BPE of about 480 entries, with Qwen2's splitting rules and special tokens.

Every word of the scenes becomes one token, leading space included: the labels of template ``qwen_2`` leave out the
first token of an answer if it is only the space.

python examples/demo/make_tokenizer.py --out examples/demo/weights/tokenizer
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from texts import END_OF_TURN, PADDING, SYSTEM, sample_text, tokenize_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN)
VOCABULARY_LIMIT = 1000


def make_tokenizer(texts: Iterable[Sequence[str]]) -> PreTrainedTokenizerBase:
    """Learn all merges from the pieces of ``texts`` and return a ``Qwen2Tokenizer``."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    byte_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = Qwen2Tokenizer(vocab={byte: number for number, byte in enumerate(byte_alphabet)}, merges=[])
    backend = blank.backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_LIMIT, initial_alphabet=byte_alphabet, show_progress=False)
    # A tokenizer cuts its text at special tokens before it merges, so the merges are learned between them.
    parts = (part for pieces in texts for piece in pieces for part in piece.split(END_OF_TURN))
    backend.train_from_iterator(parts, trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    entries = [*byte_alphabet, *map("".join, merges), *SPECIAL_TOKENS]
    vocabulary = {token: number for number, token in enumerate(entries)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        unk_token=None,
        model_max_length=1024,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


def main() -> None:
    """Make the tokenizer from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write in the Hugging Face layout")
    parser.add_argument("--texts", type=int, default=2000, help="texts to learn the merges from")
    parser.add_argument("--seed", type=int, default=11, help="seed of the texts")
    arguments = parser.parse_args()

    start_seconds = time.process_time()
    rng = random.Random(f"tokenizer/{arguments.seed}")
    tokenizer = make_tokenizer(sample_text(rng) for _ in range(arguments.texts))
    tokenizer.save_pretrained(arguments.out)
    lengths = [len(tokenize_pieces(tokenizer, sample_text(rng))) for _ in range(200)]
    print(f"{time.process_time() - start_seconds:.0f} CPU seconds, {len(tokenizer)} entries")
    print(f"system prompt {len(tokenizer(SYSTEM)['input_ids'])} tokens, longest of 200 texts {max(lengths)} tokens")


if __name__ == "__main__":
    main()
