"""Loads a tokenizer that gives the reference's tokens (transformers 4.43, slow tokenizers)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore import checked
from ross_mcore.errors import ConversationError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Suffixes of the files that the library may read in a tokenizer's folder."""
DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json")
CHECKPOINT_FOLDER = "tokenizer"
"""The name of a tokenizer's folder in a checkpoint."""
LLAMA3_END_OF_TEXT = "<|end_of_text|>"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder, padded on the right, without downloads and without code of the folder.

    A Llama tokenizer has no padding token: as in the reference it gets its unknown token, or for Llama 3 the end of
    text, because its end of turn must not count as padding. Raises TokenizerError.
    """
    from transformers import AutoTokenizer  # a second to import

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_make_printable)
    if not Path(folder).is_dir():
        raise TokenizerError(f"{folder} is not a folder; give the folder that holds tokenizer.json or tokenizer.model")
    try:
        for path in Path(folder).iterdir():
            if path.suffix in READ_SUFFIXES and not path.is_dir():
                try:
                    checked.require_regular(path, checked.MOST_TOKENIZER_FILE_BYTES)
                    if path.name in DESCRIPTIONS:
                        _require_printable_keys(checked.read_json(path))
                except (OSError, ValueError) as error:
                    raise ValueError(f"{path.name}: {checked.reason(error)}") from None
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library passes on any exception of its parsers
        raise TokenizerError(
            f"{folder} holds no usable tokenizer: {checked.reason(error)}; copy tokenizer.json, tokenizer.model, "
            "vocab.json, merges.txt and tokenizer_config.json there again, as many of them as the model came with"
        ) from None
    if tokenizer.is_fast:  # a tokenizer.json may have been saved with a limit
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    pieces = Path(folder) / "tokenizer.model"
    if pieces.is_file() and not (Path(folder) / "tokenizer.json").is_file():
        _follow_sentencepiece(tokenizer, pieces)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        end_of_text = LLAMA3_END_OF_TEXT if LLAMA3_END_OF_TEXT in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.pad_token = tokenizer.unk_token or end_of_text
    return tokenizer


def _make_printable(record: logging.LogRecord) -> bool:
    """A log filter that escapes control characters: the library's messages may quote a file."""
    record.msg, record.args = checked.printable(" ".join(record.getMessage().split())), None
    return True


def _require_printable_keys(value: Any) -> None:
    """Raises ValueError for a key with control characters, because the library prints the keys that it ignores."""
    for key in value if isinstance(value, dict) else ():
        if not key.isprintable():
            raise ValueError(f"it has the key {checked.shown(key)}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_printable_keys(inner)


def _follow_sentencepiece(tokenizer: PreTrainedTokenizerBase, model_file: Path) -> None:
    """Makes transformers 5's conversion of a SentencePiece file split text as SentencePiece (4.x, slow) does.

    It orders merges by score instead of by id, which differ when tokens were appended to a trained vocabulary, and puts
    "▁" even before text that starts with a space. One difference remains: with legacy=False, text that starts with a
    space directly after a special token gets one "▁" too many.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Regex, normalizers
    from tokenizers.models import BPE

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return
    if getattr(tokenizer, "legacy", False):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    else:
        backend.normalizer = normalizers.Replace(Regex(r"\A "), "  ")
    pieces = SentencePieceProcessor(model_file=str(model_file))
    ids = range(pieces.get_piece_size())
    ordinary = [i for i in ids if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    scores = [pieces.get_score(i) for i in ordinary]
    if scores == sorted(scores, reverse=True):
        return
    vocabulary = {pieces.id_to_piece(i): i for i in ids}
    merges = []
    for _, piece in sorted(zip(scores, map(pieces.id_to_piece, ordinary), strict=True), key=lambda pair: -pair[0]):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    backend.model = BPE(vocabulary, merges, unk_token=str(tokenizer.unk_token), fuse_unk=True, byte_fallback=True)


PADDING = re.compile(r"\W*pad\W*", re.IGNORECASE)
"""The text of a padding token: `<pad>`, `[PAD]`, `<|pad|>`."""


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, what: str) -> None:
    """Raises TokenizerError for a token whose id is beyond a model's `vocab_size`; what: names the tokenizer.

    mcore's tensor-parallel embedding gives zeros for such an id, and its cross-entropy a wrong label, without an error.
    A padding token may be beyond: published tokenizers of Llama 2 have `<pad>` with id 32000 for 32000 embeddings, and
    training pads rows with another id. Text that contains it is refused sample by sample (`require_ids`).
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    beyond = {token: n for token, n in beyond.items() if token != tokenizer.pad_token and not PADDING.fullmatch(token)}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        count = f"{len(beyond)} tokens are" if len(beyond) > 1 else "one token is"
        raise TokenizerError(
            f"the tokenizer {what} does not fit the model's vocabulary of {vocab_size} tokens: {count} beyond it, the "
            f"first is {checked.shown(token)} with id {number}. Use the tokenizer that the model was published "
            "with, or enlarge the model to this tokenizer (resize_token_embeddings of transformers) and convert it "
            "again"
        )


def require_ids(ids: Sequence[int] | NDArray[np.int64], vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConversationError for the first of a text's ids that is beyond a model's `vocab_size` embeddings."""
    if len(ids) and (largest := int(max(ids) if isinstance(ids, list) else np.max(ids))) >= vocab_size:
        token = checked.shown(tokenizer.convert_ids_to_tokens(largest))
        raise ConversationError(f"a token is beyond the vocabulary of {vocab_size}: {token} with id {largest}")


def vocabulary_beside(folder: Path) -> int | None:
    """The vocab_size of the model whose tokenizer is in `folder`, from its config.json; None if none is known.

    A model of Hugging Face has its config.json in the same folder, a checkpoint above its folder `tokenizer`.
    """
    place, section = (folder.parent, "language") if folder.name == CHECKPOINT_FOLDER else (folder, "text_config")
    try:
        config = checked.mapping(checked.read_json(place / "config.json"), "it")
        return checked.count(checked.mapping(config.get(section, config), section), "vocab_size")
    except (OSError, ValueError):
        return None


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that change with the vocabulary or with the tokens of a few difficult strings."""
    probes = ["USER: 12 don't  x\n\n\ty", "Äé 猫😀", "a</s>USER b<|im_end|>USER c <unk>"]
    facts = [sorted(tokenizer.get_vocab().items()), [encode(probe, tokenizer) for probe in probes]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text of any length, with BOS if the tokenizer adds one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # `tokenizer(text)` calls it too; a direct call takes a fraction of the time
        ids: list[int] = backend.encode(text).ids
        return ids
    return list(tokenizer(text, verbose=False).input_ids)


def encode_with_places(
    text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text and the (start, end) of their characters; `special_tokens`: with BOS if the tokenizer adds one.

    Raises TokenizerError for a tokenizer that does not know the places.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name_or_path} does not say where its tokens are in a text; save it as "
            "tokenizer.json, or use the template plain, qwen_2, v1 or llama3"
        )
    encoded = backend.encode(text, add_special_tokens=special_tokens)
    return encoded.ids, encoded.offsets
