"""Make the demo's language model: a small Qwen2, trained on text about scenes, without any picture.

    python examples/demo/make_language_model.py --out examples/demo/weights/language_model

It learns to write captions and to answer questions about a picture described in words, so that a projector can use it
later: with a frozen model of random weights stage 1 learns no captions. The text never combines the colour and the
shape of a held-out pair.

Shapes: B texts, L tokens of the longest.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scenes import HELD_OUT_PAIRS, QUESTION_KINDS, TRAINING_PAIRS, Pair, ask, sample_scene, write_caption
from texts import END_OF_TURN, format_chat, sample_text, tokenize_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

IGNORED_LABEL = -100
VOCABULARY_MULTIPLE = 128


def build_language_model(vocabulary_size: int, padding_token: int, end_token: int) -> Qwen2ForCausalLM:
    """Build the language model with random weights.

    At this width the usual ``initializer_range`` of 0.02 takes several times longer to learn anything. The embeddings
    are large compared with the layers' outputs, so that the input at a position is preserved up to the last layer: the
    denoiser must read the picture from the hidden states at the image tokens.

    Args:
        vocabulary_size: Entries of the tokenizer; the model rounds them up, as Qwen2 does.
        padding_token: For the config.
        end_token: For the config.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=math.ceil(vocabulary_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=padding_token,
        bos_token_id=None,
        eos_token_id=end_token,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> None:
    """Predict every next token of freshly drawn texts."""
    import torch
    from rich.progress import track
    from torch.nn.utils.rnn import pad_sequence

    rng = random.Random(f"language/{arguments.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    for step in track(range(arguments.steps), description="language model"):
        texts = [torch.tensor(tokenize_pieces(tokenizer, sample_text(rng))) for _ in range(arguments.batch_size)]
        tokens = pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence(texts, batch_first=True, padding_value=IGNORED_LABEL)
        loss = model(input_ids=tokens, labels=labels).loss  # padding only trails, so causal attention needs no mask
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: {loss.item():.4f} nats a token")


def measure_answers(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, pairs: tuple[Pair, ...]
) -> float:
    """Return the share of questions about captions whose answer gets the highest score, token by token."""
    import torch

    rng = random.Random("language/quality")
    right = 0
    for number in range(count):
        scene = sample_scene(rng, rng.choice(pairs))
        rounds = [ask(scene, QUESTION_KINDS[number % len(QUESTION_KINDS)])]
        tokens = torch.tensor([tokenize_pieces(tokenizer, format_chat(rounds, write_caption(scene)))])
        answer_tokens = len(tokenizer(f" {rounds[0][1]}{END_OF_TURN}")["input_ids"])
        with torch.no_grad():
            scores = model(input_ids=tokens).logits[0, -answer_tokens - 1 : -1]
        right += bool((scores.argmax(dim=1) == tokens[0, -answer_tokens:]).all())
    return right / count


def main() -> None:
    """Make the language model from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write in the Hugging Face layout")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(__file__).parent / "weights" / "tokenizer",
        help="folder that make_tokenizer.py wrote",
    )
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="texts per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=41, help="seed of the weights and the texts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start_seconds = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    model = build_language_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    train(model, tokenizer, arguments)
    model.eval()
    for name, pairs in (("training", TRAINING_PAIRS), ("held-out", HELD_OUT_PAIRS)):
        share = measure_answers(model, tokenizer, 200, pairs)
        print(f"{name} pairs described in words: {share:.1%} of the answers right")
    model.half().save_pretrained(arguments.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {time.process_time() - start_seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
