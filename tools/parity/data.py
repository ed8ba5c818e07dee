"""Rows of the model's input: tokens and labels, prompts, pictures, batches, the order of samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from parity.golden import Golden, NotRecorded, where_recorded
from parity.rows import Row, compare, compare_exactly, failed, instead, not_recorded, unsupported
from ross_mcore.architecture import VisionConfig
from ross_mcore.batch import Sample, collate
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, count_words, expand_images
from ross_mcore.data.image import ImageAspectRatio, ImagePreprocessing
from ross_mcore.data.order import modality_length_order
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TEMPLATES, Tokenized, tokenize_conversation, tokenize_prompt, write_prompt
from ross_mcore.data.tokenizer import encode, load_tokenizer
from ross_mcore.errors import ConversationError

CONVERSATIONS = "data/conversations.json"
ASPECT_RATIOS = get_args(ImageAspectRatio)
VARIANTS = r"maxlen\d+|im_start_end"


class Conversations:
    """The recorded conversations, and ours with the same settings. A case is `tokenizer|template[|variant]`."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self.recorded: dict[str, Any] = golden.json(CONVERSATIONS)["tokenized"]
        self._samples = {sample["id"]: sample for sample in golden.json("data/samples.json", list)}
        self._tokenizers: dict[str, Any] = {}

    def sample(self, name: str) -> dict[str, Any]:
        if name not in self._samples:
            raise NotRecorded(f"data/samples.json has no sample {name}")
        return self._samples[name]

    def tokenizer(self, case: str) -> Any:
        name = case.split("|")[0]
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(self.golden.tokenizer_folder(name))
        return self._tokenizers[name]

    def max_length(self, case: str) -> int:
        """The recorded `model_max_length`; a variant without one has that of its plain case."""
        plain = "|".join(case.split("|")[:2])
        key = case if "model_max_length" in self.recorded[case] else plain
        return int(self.recorded[key]["model_max_length"])

    def ours(self, case: str, sample: dict[str, Any]) -> Tokenized:
        _, template, *variants = case.split("|")
        return tokenize_conversation(
            sample["conversations"],
            int("image" in sample),
            self.tokenizer(case),
            SampleSpec(
                template,
                seq_length=self.max_length(case),
                supervise_final_eos=False,
                mm_use_im_start_end="im_start_end" in variants,
            ),
        )


def conversation_rows(golden: Golden) -> Iterator[Row]:
    """Tokens, labels and the mismatch warning of every conversation, template and tokenizer."""
    if not golden.has(CONVERSATIONS):
        return
    conversations = Conversations(golden)
    for case, table in conversations.recorded.items():
        for name in table["samples"]:
            yield from where_recorded("conversations", f"{case} {name}", _conversation_row(conversations, case, name))


def _conversation_row(conversations: Conversations, case: str, name: str) -> Iterator[Row]:
    _, template, *variants = case.split("|")
    title, recorded = f"{case} {name}", conversations.recorded[case]["samples"][name]
    if template not in TEMPLATES:
        yield unsupported("conversations", title, f"template {template}")
        return
    other = [variant for variant in variants if not re.fullmatch(VARIANTS, variant)]
    if other:
        yield unsupported("conversations", title, f"variant {other[0]}")
        return
    try:
        found = conversations.ours(case, conversations.sample(name))
    except ConversationError as error:
        made = instead if "error" in recorded else failed
        yield made("conversations", title, f"skipped: {error}", recorded.get("error", "tokens"))
        return
    if "error" in recorded:
        yield instead("conversations", title, f"{len(found.input_ids)} tokens", recorded["error"])
        return
    shown = any(IMAGE_PLACEHOLDER in turn["value"] for turn in conversations.sample(name)["conversations"])
    if found.image_spans and not shown:
        yield instead("conversations", title, "its picture is put first", "trained without its picture")
        return
    warned = "mismatch" in (recorded.get("printed") or "")
    yield compare_exactly(
        "conversations",
        title,
        [*found.input_ids, *found.labels, found.mismatch],
        [*recorded["input_ids"], *recorded["labels"], warned],
        "tokens and labels",
    )


def prompt_rows(golden: Golden) -> Iterator[Row]:
    """The text of each template, the ids to generate from, and the splitting of plain text."""
    if not golden.has(CONVERSATIONS):
        return
    conversations, prompts = Conversations(golden), golden.json(CONVERSATIONS).get("prompts", {})
    turns = _recorded_turns(prompts)
    if not turns:
        yield not_recorded("prompts", "all", "the recorded prompts do not show from which conversation they were made")
        return
    for template, recorded in prompts.items():
        if not template.startswith("_"):
            yield from where_recorded("prompts", template, _text_rows(template, recorded, turns))
    for case, ids in prompts.get("_generation_ids", {}).items():
        yield from where_recorded("prompts", f"ids {case}", _prompt_ids_row(conversations, case, turns[:-1], ids))
    for key, entries in prompts.items():
        name = re.fullmatch(r"_(\w+)_slow_vs_fast", key)
        for entry in entries if name else []:
            title = f"text {entry['text'][:40]!r}"
            row = _split_text_row(conversations, name[1] if name else "", title, entry)
            yield from where_recorded("prompts", title, row)


def _text_rows(template: str, recorded: dict[str, Any], turns: list[dict[str, str]]) -> Iterator[Row]:
    if template not in TEMPLATES:
        yield unsupported("prompts", template, f"template {template}")
        return
    for key, generation, shown in (("full", False, turns), ("generation", True, turns[:-1])):
        if recorded.get(key) is None:
            yield instead("prompts", f"{template} {key}", _prompt_text(shown, template, generation), recorded["error"])
        else:
            text = write_prompt(shown, 1, SampleSpec(template), generation)
            yield compare_exactly("prompts", f"{template} {key}", text, recorded[key], "characters")


def _prompt_ids_row(
    conversations: Conversations, case: str, turns: list[dict[str, str]], recorded: list[int]
) -> Iterator[Row]:
    template = case.split("|")[1]
    if template not in TEMPLATES:
        yield unsupported("prompts", f"ids {case}", f"template {template}")
        return
    ours = tokenize_prompt(turns, 1, conversations.tokenizer(case), SampleSpec(template))
    yield compare_exactly("prompts", f"ids {case}", ours, recorded, "tokens")


def _split_text_row(
    conversations: Conversations, tokenizer: str, title: str, recorded: dict[str, Any]
) -> Iterator[Row]:
    ours = encode(recorded["text"], conversations.tokenizer(tokenizer))
    yield compare_exactly("prompts", title, ours, recorded["slow"], "tokens")


def _recorded_turns(prompts: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of all recorded prompts, parsed from the one whose turns are marked with ###."""
    texts = (prompt.get("full") or "" for prompt in prompts.values() if isinstance(prompt, dict))
    text = next((text for text in texts if "###Human: " in text), "")
    found = re.findall(r"###(Human|Assistant): (.*?)(?=###)", text, re.DOTALL)
    return [{"from": {"Human": "human", "Assistant": "gpt"}[who], "value": said} for who, said in found]


def _prompt_text(turns: list[dict[str, str]], template: str, generation: bool) -> str:
    try:
        return f"writes {len(write_prompt(turns, 1, SampleSpec(template), generation))} characters"
    except ConversationError as error:
        return f"refuses: {error}"


def preprocessing(processor: dict[str, Any], aspect_ratio: str, size: int) -> ImagePreprocessing:
    """A recorded image processor at another size."""
    crop = "CLIP" in processor["image_processor_type"]
    tower = {"model_type": f"{'clip' if crop else 'siglip'}_vision_model", "image_size": size}
    unused = {"hidden_size": 8, "num_hidden_layers": 2, "patch_size": 1}
    vision = VisionConfig(tower | unused, processor["image_mean"], processor["image_std"])
    square = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size} if crop else square, "crop_size": square}
    return ImagePreprocessing.for_tower(vision, aspect_ratio, processor | sizes)


def _processor_size(processor: dict[str, Any]) -> int:
    size = processor["size"]
    return int(size.get("shortest_edge") or size["height"])


def _facts_of_images(golden: Golden) -> dict[str, Any]:
    """data/images.json; empty if there is none."""
    return golden.json("data/images.json") if golden.has("data/images.json") else {}


def image_rows(golden: Golden) -> Iterator[Row]:
    """The towers' input at the recorded size and at full size, padded and not; must be exactly equal.

    Recorded names: train.<processor>.<aspect>.<image>, real.<...>.<image>.stride<n>, gray.<processor>.<aspect> (every
    third pixel of the grey image), anyres.* (which the reference cannot train on).
    """
    if not golden.has("data/images.safetensors"):
        return
    tensors, _ = golden.tensors("data/images.safetensors")
    processors = dict(golden.processors())
    for name, recorded in tensors.items():
        yield from where_recorded("images", name, _image_rows(golden, name, recorded, processors))
    for name, colour in _facts_of_images(golden).get("pad_colour", {}).items():
        if name in processors:
            ours = preprocessing(processors[name], "pad", _processor_size(processors[name])).background
            yield compare_exactly("images", f"pad colour {name}", ours, colour, "channels")


def _image_rows(golden: Golden, name: str, recorded: Tensor, processors: dict[str, Any]) -> Iterator[Row]:
    kind, processor_name, *rest = name.split(".")
    aspect_ratio = rest.pop(0) if rest else ""
    processor = processors.get(processor_name)
    if kind == "anyres":
        yield unsupported("images", name, "several crops of one picture (anyres)")
        return
    if kind not in ("train", "real", "gray") or aspect_ratio not in ASPECT_RATIOS:
        yield unsupported("images", name, f"{kind} {aspect_ratio}")
        return
    if processor is None:
        raise NotRecorded(f"data/ has no proc_{processor_name}")
    size, stride, image = _processor_size(processor), 1, rest[0] if rest else "img_gray"
    facts = golden.json("data/images.json")[name.rpartition(".")[0]] if kind == "real" else {}
    if kind == "real":
        size, stride = facts["shape"][-1], int(rest[1].removeprefix("stride"))
    elif kind == "gray":
        stride = _stride(size, recorded.shape[-1])
    pixels = preprocessing(processor, aspect_ratio, size)(golden.picture(image))
    yield compare("images", name, pixels[:, ::stride, ::stride], recorded, 0.0)
    if kind == "real":
        for key, ours in (("mean", pixels.mean(dtype=np.float64)), ("std", pixels.std(ddof=1, dtype=np.float64))):
            yield compare("images", f"{name.rpartition('.')[0]} {key}", ours, facts[key], floor=1e-6)


def _stride(size: int, kept: int) -> int:
    """The step that keeps `kept` of `size` pixels; 3 if that fits."""
    fitting = [step for step in range(1, size + 1) if -(-size // step) == kept]
    if not fitting:
        raise NotRecorded(f"no step leaves {kept} of {size} pixels")
    return 3 if 3 in fitting else fitting[0]


def collated_rows(golden: Golden) -> Iterator[Row]:
    """A batch of the recorded samples, built by our code from text and picture to `Batch`.

    Its tokenizer, template, processor and aspect ratio are found by trying the recorded ones. The reference expands
    pictures inside the model, this trainer before it, so the reference's rows are expanded for the comparison.
    """
    if golden.has("data/collated.safetensors"):
        yield from where_recorded("collated", "collated batch", _collated_rows(golden))


def _collated_rows(golden: Golden) -> Iterator[Row]:
    recorded, _ = golden.tensors("data/collated.safetensors")
    conversations = Conversations(golden)
    samples = [conversations.sample(name) for name in golden.json("data/images.json")["collated_names"]]
    kept = [mask.bool() for mask in recorded["attention_mask"]]
    ids = [row[mask].tolist() for row, mask in zip(recorded["input_ids"], kept)]
    labels = [row[mask].tolist() for row, mask in zip(recorded["labels"], kept)]
    case = next((case for case in conversations.recorded if _tokens_are(conversations, case, samples, ids)), None)
    if case is None:
        raise NotRecorded("data/conversations.json records no setting with these tokens")
    if recorded["images"].shape[-1] not in {_processor_size(processor) for _, processor in golden.processors()}:
        raise NotRecorded(f"data/ has no proc_* for pictures of {recorded['images'].shape[-1]} pixels")
    pixels = next(_pixels_like(golden, samples, recorded["images"]), None)
    if pixels is None:
        yield failed("collated", "pixels", "no recorded processor and aspect ratio gives these pictures")
        return
    image_tokens = 4  # any number: both sides are expanded alike
    ours: list[Sample] = []
    theirs: list[Sample] = []
    for number, (sample, picture) in enumerate(zip(samples, pixels)):
        tokenized = conversations.ours(case, sample)
        own = (ours, tokenized.input_ids, tokenized.labels)
        for rows, row_ids, row_labels in (own, (theirs, ids[number], labels[number])):
            tokens, targets, starts = expand_images(row_ids, row_labels, image_tokens)
            pictures: list[Tensor | None] = [picture] if starts and picture is not None else []
            rows.append(
                Sample(sample["id"], number, torch.from_numpy(tokens), torch.from_numpy(targets), starts, pictures)
            )
    length, size = max(sample.tokens.numel() for sample in theirs), recorded["images"].shape[-1]
    mine, wanted = (collate([[sample] for sample in samples], length, size) for samples in (ours, theirs))
    for name in ("tokens", "labels", "sample_starts", "image_starts"):
        yield compare_exactly(
            "collated",
            f"{case}: {name}",
            getattr(mine, name).flatten().tolist(),
            getattr(wanted, name).flatten().tolist(),
        )
    pictured = [row for row, sample in enumerate(samples) if "image" in sample]
    if pictured:
        yield compare("collated", "pixels", mine.pixels, recorded["images"][pictured], 0.0)


def _tokens_are(conversations: Conversations, case: str, samples: list[dict[str, Any]], ids: list[list[int]]) -> bool:
    if case.split("|")[1] not in TEMPLATES:
        return False
    table = conversations.recorded[case]["samples"]
    return [table.get(sample["id"], {}).get("input_ids") for sample in samples] == ids


def _pixels_like(golden: Golden, samples: list[dict[str, Any]], recorded: Tensor) -> Iterator[list[Tensor | None]]:
    """The samples' pictures for each recorded processor and aspect ratio that reproduces the recorded pictures."""
    for _, processor in golden.processors():
        if _processor_size(processor) != recorded.shape[-1]:
            continue
        for aspect_ratio in ASPECT_RATIOS:
            read = preprocessing(processor, aspect_ratio, recorded.shape[-1])
            pixels: list[Tensor | None] = []
            for sample in samples:
                name = sample.get("image")
                pixels.append(None if name is None else _read(golden, name, read))
            if all(p is None or torch.equal(p, r) for p, r in zip(pixels, recorded)):
                yield pixels


def _read(golden: Golden, name: str, read: ImagePreprocessing) -> Tensor:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return torch.from_numpy(read(golden.picture(stem)))


def order_rows(golden: Golden) -> Iterator[Row]:
    """The lengths by which the reference groups samples, and the resulting order."""
    if golden.has("data/samples.json") and "modality_lengths" in _facts_of_images(golden):
        samples = golden.json("data/samples.json", list)
        words = [count_words(sample["conversations"]) for sample in samples]
        signed = [count if "image" in sample else -count for count, sample in zip(words, samples)]
        recorded = _facts_of_images(golden)["modality_lengths"]
        yield compare_exactly("sampler", "modality lengths", signed, recorded, "samples")
    if golden.has("data/sampler.json"):
        for case in golden.json("data/sampler.json", list):
            generator = torch.Generator().manual_seed(case["torch_seed"])
            order = modality_length_order(case["lengths"], case["batch_size"], case["world_size"], generator)
            batch = f"{case['batch_size']} x {case['world_size']}"
            title = f"{len(case['lengths'])} samples, batch {batch}, seed {case['torch_seed']}"
            yield compare_exactly("sampler", title, order, case["indices"], "samples")
