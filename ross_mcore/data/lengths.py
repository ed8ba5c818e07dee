"""Checks that the sample lengths in an index were measured with a run's tokenizer and template."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.data.shard_reader import INDEX_TOOL, LengthSource, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import tokenize_conversation
from ross_mcore.data.tokenizer import fingerprint_tokenizer
from ross_mcore.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def length_source(tokenizer: PreTrainedTokenizerBase, spec: SampleSpec) -> LengthSource:
    """The source of lengths measured by this program: tokenizer, template, and a fingerprint of tokenized examples.

    The examples are conversations with and without pictures. Their fingerprint changes with this program's templates
    and with the places of pictures, which tokenizer and template name do not show.
    """
    short = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    inside = [{"from": "human", "value": "See <image> and <image>."}, {"from": "gpt", "value": "Two."}]
    facts: list[list[Any]] = []
    for turns, num_images in ((short, 1), (short * 2, 2), (inside, 1), (inside, 3), (short, 0)):
        try:
            row = tokenize_conversation(turns, num_images, tokenizer, spec.measured)
            facts.append([row.input_ids, row.labels])
        except ConversationError as error:
            facts.append([str(error)])
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return LengthSource(fingerprint_tokenizer(tokenizer), spec.template, spec.mm_use_im_start_end, fingerprint)


def stale_lengths(reader: ShardReader, source: LengthSource, tokenizer_folder: Path | str) -> str | None:
    """None if the lengths of an index have this source, else the difference and the command that measures again."""
    found = reader.length_source
    if found is None:
        was = "has no lengths"
    elif found != source:
        was = f"was measured with another {found.difference(source)}"
    elif never_shown(reader):
        was = f"was measured without the pictures of {never_shown(reader)} samples whose text has no <image>"
    else:
        return None
    flags = ["--data-path", str(reader.folder), "--tokenizer", str(tokenizer_folder), "--template"]
    flags += [source.template.partition("#")[0]]  # without the digest of a template of one's own
    flags += ["--mm-use-im-start-end"] if source.mm_use_im_start_end else []
    flags += ["--truncated-images", "fill"] if reader.truncated_images == "fill" else []
    return f"the index of {reader.folder} {was}; mend it with: {INDEX_TOOL} {shlex.join(flags)}"


def never_shown(reader: ShardReader) -> int:
    """Number of samples whose picture the index leaves out of the row, which indexes of earlier versions have."""
    return int(((reader.samples["image_spans"] == 0) & (reader.samples["num_images"] > 0)).sum())
