"""Templates: conversations -> text -> token ids and labels.

TEMPLATES holds the reference's (conversation.py:264-520 and train.py:620-893; tests compare every token with recorded
values) and ChatML. Others are a YAML file or the tokenizer's own chat template (chat_templates.py). A system turn,
which the reference does not have, replaces a template's own system text.
Legend: L tokens of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.checked import shown
from ross_mcore.data.chat_templates import (
    CHATML,
    SUFFIXES,
    TokenizerTemplate,
    TurnTemplate,
    Written,
    digest_of,
    labelled,
)
from ross_mcore.data.conversation import (
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
    Dialogue,
    as_dialogue,
    cut_row,
    encode_text,
    expand_images,
)
from ross_mcore.data.labels import Prompt, mask_byte_pairs, mask_caption, mask_headers, mask_sentencepiece
from ross_mcore.data.spec import UNCUT, SampleSpec
from ross_mcore.data.tokenizer import encode
from ross_mcore.errors import ConversationError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER_IN_TEXT = "<im_start><image><im_end>"
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWER_START = " ASSISTANT: "
IM_END = "<|im_end|>"
END_OF_TURN = "<|eot_id|>"
HEADERS = {
    "system": f"<|start_header_id|>system<|end_header_id|>\n\n{{text}}{END_OF_TURN}",
    "human": "<|start_header_id|>user<|end_header_id|>\n\n",
    "gpt": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}

Turn = tuple[str, str | None]
"""(role, text) of a turn; the text is None for an answer to be generated."""


@dataclass(frozen=True)
class Tokenized:
    """input_ids [L] with one IMAGE_TOKEN_INDEX per image, labels [L], not shifted.

    `mismatch`: the answers could not be located among the tokens, so every label is IGNORE_INDEX; `text_tokens`: number
    of ids without images, before any cut.
    """

    input_ids: list[int]
    labels: list[int]
    mismatch: bool
    text_tokens: int

    @property
    def image_spans(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)

    @property
    def label_tokens(self) -> int:
        """Number of labels in a loss: not of the first token, which nothing predicts, nor of images."""
        return sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in self.labels[1:])


@dataclass(frozen=True)
class Template:
    """A template of the reference: how turns become text and labels.

    `system` opens the prompt; `system_form` is how a conversation's own system text is written in its place, "" if it
    is left out. `answer_start` precedes and `round_end` follows every answer. `write_turns` returns the text of the
    turns, `mask` the labels and whether they are a mismatch. If not `tokenized`, `round_end` is removed from the text
    before it is tokenized.
    """

    system: str
    system_form: str
    answer_start: str
    round_end: str
    write_turns: Callable[[list[Turn], Template], str]
    mask: Callable[[Prompt], tuple[list[int], bool]]
    tokenized: bool = True

    def opening(self, system: str | None) -> str:
        """The text before the first turn; a blank `system` leaves out the template's own."""
        if system is None:
            return self.system
        return self.system_form.replace("{text}", system) if system.strip() else ""

    def write(self, dialogue: Dialogue, generation: bool = False) -> Written:
        """The text of a conversation; with `generation`, up to the start of the answer. `mask` finds the answers."""
        turns: list[Turn] = [*dialogue.turns, *([("gpt", None)] if generation else [])]
        return Written(self.opening(dialogue.system) + self.write_turns(turns, self), [])


AnyTemplate = Template | TurnTemplate | TokenizerTemplate


def _write_caption(turns: list[Turn], style: Template) -> str:
    """The instruction's pictures without its text, then the caption, which may show pictures too.

    A prompt for generation always shows at least one picture.
    """
    pictures = IMAGE_PLACEHOLDER * (turns[0][1] or "").count(IMAGE_PLACEHOLDER)
    if turns[-1][1] is None:
        return pictures or IMAGE_PLACEHOLDER
    if [role for role, _ in turns] != ["human", "gpt"]:
        raise ConversationError("plain takes two turns, an instruction and a caption")
    return f"{pictures}{turns[1][1]}{style.round_end}"


def _write_dialogue(turns: list[Turn], style: Template) -> str:
    """`USER: q ASSISTANT: a<round_end>USER: ...`; a turn without text is its role and a colon."""
    ends = {"human": " ", "gpt": style.round_end}
    return "".join(f"{ROLES[role]}: {text}{ends[role]}" if text else f"{ROLES[role]}:" for role, text in turns)


def _write_headers(turns: list[Turn], style: Template) -> str:
    """A header, the text and `<|eot_id|>` for every turn; an answer to be generated is its header alone."""
    ends = {"human": END_OF_TURN, "gpt": END_OF_TURN + style.round_end}
    return "".join(HEADERS[role] if text is None else f"{HEADERS[role]}{text}{ends[role]}" for role, text in turns)


def _system(human: str) -> str:
    return (
        f"A chat between a curious {human} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
    )


TEMPLATES: dict[str, Template | TurnTemplate] = {
    "plain": Template("", "", "", "\n", _write_caption, mask_caption),
    "qwen_2": Template(_system("human"), "{text} ", ANSWER_START, IM_END, _write_dialogue, mask_byte_pairs),
    "v1": Template(_system("user"), "{text} ", ANSWER_START, "</s>", _write_dialogue, mask_sentencepiece),
    "llama3": Template(
        "", HEADERS["system"], HEADERS["gpt"], "<|eot_conversation|>", _write_headers, mask_headers, tokenized=False
    ),
    "chatml": CHATML,
    "v1_qwen2": Template(_system("human"), "{text} ", ANSWER_START, IM_END, _write_dialogue, mask_sentencepiece),
}
"""The template by its name. The reference's: conversation.py:264-520 and the dispatch of train.py:881-893."""

TRAINING_TEMPLATES = tuple(name for name in TEMPLATES if name != "v1_qwen2")
"""Templates for training. v1_qwen2 has no labels for more than one round, and the prompts of qwen_2."""

NEEDED = {
    "qwen_2": (IM_END,),
    "v1": ("</s>",),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", END_OF_TURN),
    "chatml": ("<|im_start|>", IM_END),
}
"""What a template writes that must be one token each."""

OF_TOKENIZER = "tokenizer"
"""The value of --template for the tokenizer's own chat template."""


def with_template(spec: SampleSpec, given: str, tokenizer: PreTrainedTokenizerBase) -> SampleSpec:
    """`spec` with the template of a --template: a name, `tokenizer`, or the path of a YAML file.

    A template that is not in TEMPLATES gets a name with a digest of its content, so that a change of the content is a
    change of the name; the content of a YAML file is in the spec. Raises TokenizerError for an unknown template, a bad
    file, or a template that the tokenizer cannot write.
    """
    own: dict[str, str] = {}
    if given == OF_TOKENIZER:
        name = f"{OF_TOKENIZER}#{TokenizerTemplate.of(tokenizer).digest}"
    elif given.endswith(SUFFIXES):
        text = TurnTemplate.read(Path(given)).as_text()
        name = f"{re.sub('[^A-Za-z0-9_.-]', '_', Path(given).name)}#{digest_of(text)}"
        own[name] = text
    else:
        name = given
        require_known(given)
    found = replace(spec, template=name, own_templates=own)
    require_fit(found, tokenizer)
    return found


def require_known(given: str) -> None:
    """Raises TokenizerError unless the value of a --template can be one."""
    if given not in TRAINING_TEMPLATES and given != OF_TOKENIZER and not given.endswith(SUFFIXES):
        raise TokenizerError(
            f"--template {given} is not one of {', '.join(TRAINING_TEMPLATES)}, {OF_TOKENIZER} (the tokenizer's own "
            "chat template) or a YAML file of your own (docs/data.md, Templates)"
        )


def template_of(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase | None = None) -> AnyTemplate:
    """The template of a spec. Raises KeyError for an unknown one, TokenizerError if it is another tokenizer's."""
    found = TEMPLATES.get(spec.template)
    if found is not None:
        return found
    if spec.template in spec.own_templates:
        return TurnTemplate.from_text(spec.own_templates[spec.template])
    if tokenizer is None or not spec.template.startswith(f"{OF_TOKENIZER}#"):
        raise KeyError(f"template {spec.template!r} is not one of {', '.join(TRAINING_TEMPLATES)}")
    own = TokenizerTemplate.of(tokenizer)
    if spec.template != f"{OF_TOKENIZER}#{own.digest}":
        raise TokenizerError(
            f"the chat template of the tokenizer {tokenizer.name_or_path} is not the one of the template "
            f"{spec.template}; give the tokenizer that was used before"
        )
    return own


def require_trainable(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises KeyError for a template that is unknown or not for training; other errors as template_of."""
    if spec.template == "v1_qwen2":
        raise KeyError(f"template {spec.template!r} is not one of {', '.join(TRAINING_TEMPLATES)}")
    template_of(spec, tokenizer)


def answer_end(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that ends an answer; white space alone only where it is all of it."""
    style = template_of(spec, tokenizer)
    end = style.answer_end if not isinstance(style, Template) else style.round_end if style.tokenized else END_OF_TURN
    return end.strip() or end


def end_of_answer(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends an answer, None where it is not one token."""
    ids = encode(answer_end(spec, tokenizer).strip(), tokenizer)[len(encode("", tokenizer)) :]
    return ids[0] if len(ids) == 1 else None


def require_fit(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TokenizerError when the tokenizer cannot write a template, or an ordinary conversation has no label."""
    where = f"the tokenizer {tokenizer.name_or_path}"
    others = f"templates whose tokens it has: {', '.join(writable_templates(tokenizer))}"
    if missing := _missing(spec.template, tokenizer):
        raise TokenizerError(f"--template {spec.template} writes {missing[0]}, not one token of {where}; {others}")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A thing."}]
    reason = why_without_labels(turns if spec.template == "plain" else turns * 2, 0, tokenizer, spec.measured)
    if reason is not None:
        raise TokenizerError(f"--template {spec.template} does not fit {where}: {reason}; {others}")


def _missing(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a template needs as one token and the tokenizer does not have."""
    added = len(encode("", tokenizer))
    return [token for token in NEEDED.get(template, ()) if len(encode(token, tokenizer)) != added + 1]


def writable_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The templates whose tokens a tokenizer has, by name."""
    return [name for name in TRAINING_TEMPLATES if not _missing(name, tokenizer)]


DEFAULT_OF = {
    "plain": "the default of --training-stage pretrain",
    "llama3": "the default of a Llama 3 tokenizer",
    "qwen_2": "the default of a Qwen tokenizer, as in the reference; Qwen's own format is --template chatml",
    "chatml": "the default of a tokenizer with <|im_start|> and <|im_end|>",
    "v1": "the default of a Llama tokenizer",
}
"""Why `default_template` chooses a template."""


def default_template(training_stage: str, model_type: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template when --template is not given; None when none is known to fit."""
    if training_stage == "pretrain":
        return "plain"
    has = writable_templates(tokenizer)
    is_qwen, begins = model_type.startswith("qwen"), bool(encode("", tokenizer))
    fits = {"llama3": True, "qwen_2": is_qwen, "chatml": True, "v1": begins}
    return next((name for name, rest in fits.items() if rest and name in has), None)


def tokenize_conversation(
    conversations: Any,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    spec: SampleSpec,
) -> Tokenized:
    """Ids and labels of a LLaVA conversation, a list of {"from": "human" | "gpt", "value": text}.

    A first turn may be from "system"; `plain` leaves it out, because it writes no more than pictures and caption.

    `<image>` is a picture if `num_images` is positive. As in the reference, only rows without a picture are cut to
    `spec.seq_length` here.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = template_of(spec, tokenizer)
    written = style.write(_dialogue(conversations, num_images, spec))
    text = written.text
    shows_image = _shows_image(text, num_images, spec.template)
    if not isinstance(style, Template):
        ids, labels = labelled(written, shows_image, tokenizer, style.adds_special_tokens)
        text_tokens = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
        end = None if shows_image else spec.seq_length
        return Tokenized(ids[:end], labels[:end], False, text_tokens)
    ids = encode_text(text if style.tokenized else text.replace(style.round_end, ""), shows_image, tokenizer)
    text_tokens = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
    if not shows_image:
        ids = ids[: spec.seq_length]
    prompt = Prompt(text, ids, num_images, tokenizer, style.answer_start, style.round_end, spec)
    labels, mismatch = style.mask(prompt)
    return Tokenized(ids, labels, mismatch, text_tokens)


def why_without_labels(
    conversations: Any,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    spec: SampleSpec,
    image_tokens: int = 0,
) -> str | None:
    """Why a conversation has no label, as a short reason for counting; None if it has labels.

    To be asked only about a row whose `label_tokens` is 0, because it tokenizes the conversation again. A cut to
    `spec.seq_length` is a reason too, if `image_tokens` is the number of tokens of a picture. The reason of a
    conversation that cannot be a row is that of its ConversationError.
    """
    try:
        row = tokenize_conversation(conversations, num_images, tokenizer, replace(spec, seq_length=UNCUT))
        tokens, labels, starts = expand_images(row.input_ids, row.labels, image_tokens)
        if row.label_tokens and np.any(
            cut_row(tokens, labels, starts, image_tokens, spec.seq_length)[1][1:] != IGNORE_INDEX
        ):
            return None
    except ConversationError as error:
        return str(error)
    if row.label_tokens:
        return "its answers are beyond --seq-length"
    style, (system, turns) = template_of(spec, tokenizer), as_dialogue(conversations, num_images)
    answers = [text for role, text in turns if role == "gpt"]
    if not answers:
        return "it has no answer"
    if not any(text.strip() for text in answers):
        return "every answer is empty"
    if isinstance(style, Template):  # whose labels are all dropped where its arithmetic does not fit
        if "" in answers:
            return "an answer is empty"
        if turns[-1][0] == "human":
            return "the last turn is the human's"
        texts = [system or "", *(text for _, text in turns)]
        words = [word.strip() for word in (style.answer_start, style.round_end) if word.strip()]
        if word := next((word for word in words for text in texts if word in text), None):
            return f"a turn contains the template's own {word}"
        if tokenizer.pad_token_id in row.input_ids:
            return f"a turn contains the padding token {tokenizer.pad_token}"
    return "the answers are not found among the tokens: tokenizer and template do not fit"


def tokenize_prompt(
    conversations: Any, num_images: int, tokenizer: PreTrainedTokenizerBase, spec: SampleSpec
) -> list[int]:
    """Ids to generate from: a conversation whose last turn is the human's, with the answer's role written after it.

    `plain` returns the images alone. Like the reference, later rounds of `llama3` keep `<|eot_conversation|>` as text
    here, unlike in training. Raises as `write_prompt`.
    """
    style = template_of(spec, tokenizer)
    written = style.write(_dialogue(conversations, num_images, spec, generation=True), generation=True)
    shows_image = _shows_image(written.text, num_images, spec.template)
    if isinstance(style, Template):
        return encode_text(written.text, shows_image, tokenizer)
    return labelled(written, shows_image, tokenizer, style.adds_special_tokens)[0]


def write_prompt(
    conversations: Any,
    num_images: int,
    spec: SampleSpec,
    generation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The text of a conversation, with one `<image>` per picture; with `generation`, up to the start of the answer.

    `spec.mm_use_im_start_end` puts the plain text `<im_start>` and `<im_end>` around every `<image>`. Only a template
    of the tokenizer needs `tokenizer`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    dialogue = _dialogue(conversations, num_images, spec, generation)
    return template_of(spec, tokenizer).write(dialogue, generation).text


def _dialogue(conversations: Any, num_images: int, spec: SampleSpec, generation: bool = False) -> Dialogue:
    """The turns as they are written; they alternate between human and gpt, except in `plain`."""
    dialogue = as_dialogue(conversations, num_images)
    turns = dialogue.turns
    if num_images and spec.mm_use_im_start_end:
        turns = [(role, text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_IN_TEXT)) for role, text in turns]
    if generation and turns[-1][0] != "human":
        raise ConversationError("nothing to answer: the last turn is not the human's")
    for place, (role, text) in enumerate(turns if spec.template != "plain" else []):
        if role != ("human", "gpt")[place % 2]:
            raise ConversationError(
                f"the turns do not alternate between human and gpt: two of {role} in a row, the second {shown(text)}; "
                "join them"
            )
    return dialogue._replace(turns=turns)


def _shows_image(text: str, num_images: int, template: str) -> bool:
    """Whether `<image>` in the text is a picture; in a caption it always is."""
    return num_images > 0 or (template == "plain" and IMAGE_PLACEHOLDER in text)
