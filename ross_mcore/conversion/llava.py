"""Contents of a folder for transformers' LlavaForConditionalGeneration, of Qwen2 or Llama with a SigLIP or CLIP tower.

Its weights have the names of checkpoints on the hub (language_model.model.*), which all versions of transformers and
vLLM read. The tokenizer is written as the training used it, for any version too: `<image>` is a token of its own, BOS
is written by the chat template and not by the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ross_mcore import parts
from ross_mcore.architecture import LanguageConfig, ModelConfig
from ross_mcore.conversion import mapping
from ross_mcore.conversion.chat_template import as_jinja, gap_of
from ross_mcore.conversion.export_config import SpecialTokens, language_config, vision_config
from ross_mcore.conversion.table import AnyEntry, Entry, Same, Vocabulary
from ross_mcore.conversion.tokenizer_files import added_tokens_decoder, with_old_merges
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TEMPLATES, Template, end_of_answer, tokenize_prompt
from ross_mcore.errors import ConversionError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PROJECTOR_TYPE = "mlp2x_gelu"
"""The only projector that LlavaForConditionalGeneration has."""
STRATEGIES = {"siglip_vision_model": "full", "clip_vision_model": "default"}
"""Which of a tower's outputs are features: all, or all but the class token."""
PADDING_PROCESSOR = "LlavaImageProcessor"
PROCESSORS = {"siglip_vision_model": "SiglipImageProcessor", "clip_vision_model": "CLIPImageProcessor"}


class Rows(Vocabulary):
    """[vocab_size, D] -> [rows, D], with the mean of all rows in the new ones.

    A new token's logit is then the mean of all logits, never the largest.
    """

    def __init__(self, ours: str, theirs: str, rows: int) -> None:
        super().__init__(ours, theirs)
        self.rows = rows

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [(self.rows, *ours[1:])]

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        (matrix,) = super().to_theirs(ours, language)
        new = self.rows - len(matrix)
        if new <= 0:
            return [matrix]
        return [torch.cat([matrix, matrix.float().mean(0, keepdim=True).to(matrix.dtype).expand(new, -1)])]


def llava_table(model: ModelConfig, rows: int) -> tuple[AnyEntry, ...]:
    """Entries of language model, tower and projector; rows: of the vocabulary. Raises ConversionError."""
    if model.projector.projector_type != PROJECTOR_TYPE:
        raise ConversionError(
            f"LlavaForConditionalGeneration has the projector {PROJECTOR_TYPE}, and this model's is "
            f"{model.projector.projector_type}; export it with --format ross or hf"
        )
    tower = parts.TRANSFORMERS_4_TOWER + "{name}"
    return (
        *(
            _in_llava(entry, rows)
            for entry in mapping.part_table(parts.LANGUAGE_MODEL, model)
            if isinstance(entry, Entry)
        ),
        Same(parts.VISION_TOWER.weight("tower.{name}"), f"vision_tower.{tower}"),
        Same(parts.PROJECTOR.weight("0.{name}"), "multi_modal_projector.linear_1.{name}"),
        Same(parts.PROJECTOR.weight("2.{name}"), "multi_modal_projector.linear_2.{name}"),
    )


def _in_llava(entry: Entry, rows: int) -> Entry:
    """An entry of the language model under its name in a LLaVA model."""
    theirs = [parts.LANGUAGE_MODEL.weight(name) for name in entry.theirs]  # the same word there
    return Rows(entry.ours, theirs[0], rows) if isinstance(entry, Vocabulary) else type(entry)(entry.ours, *theirs)


@dataclass(frozen=True)
class LlavaTokenizer:
    """The tokenizer of an export. `backend`: tokenizer.json; `chat_template`: None where there is none."""

    backend: Tokenizer
    image_token: int
    chat_template: str | None
    ends: tuple[int, ...]
    """The ids that end an answer."""

    def files(self, trained: PreTrainedTokenizerBase, max_length: int) -> dict[str, dict[str, Any]]:
        """tokenizer.json and tokenizer_config.json, as transformers 4.43 to 5 read them."""
        content: dict[str, Any] = json.loads(self.backend.to_str())
        with_old_merges(content)
        special = [token["content"] for token in content["added_tokens"] if token["special"]]
        named = {key: str(token) for key, token in trained.special_tokens_map.items() if isinstance(token, str)}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
            "processor_class": "LlavaProcessor",
            "added_tokens_decoder": added_tokens_decoder(content),
            "additional_special_tokens": [token for token in special if token not in named.values()],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "padding_side": "left",  # a batch of prompts ends where its answers begin
            **named,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {"tokenizer.json": content, "tokenizer_config.json": config}


def llava_tokenizer(trained: PreTrainedTokenizerBase, spec: SampleSpec) -> LlavaTokenizer:
    """The tokenizer with `<image>`, and the chat template of `spec` (template "": none).

    Raises ConversionError where no chat template gives the ids of the training, TokenizerError.
    """
    if getattr(trained, "backend_tokenizer", None) is None:
        raise ConversionError(f"the tokenizer {trained.name_or_path} cannot be saved as tokenizer.json; give another")
    gap = gap_of(trained)
    template = as_jinja(spec, trained, gap)
    ends = {trained.eos_token_id, None if spec.template in ("", "plain") else end_of_answer(spec, trained)}
    found = tuple(sorted(end for end in ends if end is not None))
    backend = _backend(trained, keep_normalizer=not gap)
    image = backend.token_to_id(IMAGE_PLACEHOLDER)
    assert image is not None  # just added
    if template is not None:
        _require_equal_ids(backend, image, template, trained, spec)
    return LlavaTokenizer(backend, image, template, found)


def _backend(trained: PreTrainedTokenizerBase, keep_normalizer: bool) -> Tokenizer:
    """A copy of a tokenizer with `<image>` and without BOS.

    keep_normalizer: false leaves out the doubling of leading spaces (data/tokenizer.py:_follow_sentencepiece), because
    the gap after special tokens has its effect already.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from tokenizers.normalizers import Replace

    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
    backend.post_processor = processors.Sequence([])
    if not keep_normalizer and isinstance(backend.normalizer, Replace):
        backend.normalizer = None
    return backend


PROBES: tuple[tuple[int, list[tuple[str, str]]], ...] = (
    (1, [("human", "<image>\nWhat is it?")]),
    (1, [("human", "What is it?\n<image>"), ("gpt", "A red cube."), ("human", " And 12 of them?")]),
    (0, [("human", "Is it so?"), ("gpt", "It's so."), ("human", "Why?")]),
    (2, [("human", "<image>\n<image>\nWhich?")]),
)
"""(pictures, turns) of the conversations whose ids are compared."""


def _require_equal_ids(
    backend: Tokenizer, image: int, template: str, trained: PreTrainedTokenizerBase, spec: SampleSpec
) -> None:
    """Raises ConversionError unless rendered prompts have the ids of the training."""
    from transformers.utils.chat_template_utils import render_jinja_template

    roles, variables = {"human": "user", "gpt": "assistant"}, dict[str, Any](trained.special_tokens_map)
    style = TEMPLATES.get(spec.template)
    one_round = isinstance(style, Template) and not style.tokenized  # later rounds differ from training (write_prompt)
    for pictures, turns in PROBES:
        if one_round and len(turns) > 1:
            continue
        messages = [{"role": roles[role], "content": text} for role, text in turns]
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **variables
        )
        text = rendered[0][0]
        found = [
            IMAGE_TOKEN_INDEX if token == image else token
            for token in backend.encode(text, add_special_tokens=False).ids
        ]
        conversation = [{"from": role, "value": text} for role, text in turns]
        expected = tokenize_prompt(conversation, pictures, trained, spec)
        if found != expected:
            raise ConversionError(
                f"the chat template of {spec.template} does not give the ids of the training with the tokenizer "
                f"{trained.name_or_path}: {found} instead of {expected} for {text!r}; give another --template, or "
                "export with --format ross"
            )


def llava_config(model: ModelConfig, tokens: SpecialTokens, dtype: str, rows: int, image_token: int) -> dict[str, Any]:
    """config.json; rows: of the vocabulary matrix."""
    vision = vision_config(model.vision, dtype)
    del vision["architectures"], vision["torch_dtype"]
    text = {**language_config(model.language, tokens, dtype), "vocab_size": rows}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_token,
        "image_seq_length": model.vision.image_tokens,
        "vision_feature_layer": model.vision.select_layer,
        "vision_feature_select_strategy": STRATEGIES[model.vision.model_type],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": model.language.tie_word_embeddings,
        "torch_dtype": dtype,
        **tokens.fields(),
    }


def generation_config(tokens: SpecialTokens, ends: Sequence[int]) -> dict[str, Any]:
    """generation_config.json: greedy, until one of `ends`."""
    ids = tokens.fields()
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return {"do_sample": False, **ids}


def processor_files(model: ModelConfig, resample: int, aspect_ratio: str) -> dict[str, dict[str, Any]]:
    """processor_config.json and preprocessor_config.json, which do what data/image.py does."""
    vision, kind = model.vision, model.vision.model_type
    side = {"height": vision.image_size, "width": vision.image_size}
    crops, pads = kind == "clip_vision_model", aspect_ratio == "pad"
    pictures = {
        "image_processor_type": PADDING_PROCESSOR if pads else PROCESSORS[kind],
        "processor_class": "LlavaProcessor",
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "do_pad": pads,
        "do_center_crop": crops,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "rescale_factor": 1 / 255,
        "resample": resample,
        "size": {"shortest_edge": vision.image_size} if crops else side,
        "crop_size": side,
    }
    config = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": model.vision.huggingface["patch_size"],
        "vision_feature_select_strategy": STRATEGIES[kind],
        "num_additional_image_tokens": int(kind == "clip_vision_model"),
    }
    return {"processor_config.json": config, "preprocessor_config.json": pictures}
