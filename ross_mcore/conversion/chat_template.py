"""The template of a training as a chat template (Jinja) that transformers, vLLM and other programs render.

Every template begins with the same lines (TURNS), which do what data/conversation.py:as_dialogue does: they place the
pictures and leave `turns`, whose contents are plain text, and `system`. The lines after them write these turns as
Template, TurnTemplate or TokenizerTemplate does.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ross_mcore.checkpoint.folder import TRAIN_STATE, Checkpoint
from ross_mcore.data.chat_templates import FIXED, PLACE, TokenizerTemplate, TurnTemplate
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import (
    ANSWER_START,
    END_OF_TURN,
    HEADERS,
    IMAGE_PLACEHOLDER_IN_TEXT,
    ROLES,
    Template,
    template_of,
    with_template,
)
from ross_mcore.data.tokenizer import encode
from ross_mcore.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS = """\
{%- set ns = namespace(parts=0, placed=0, turns=[], system=none) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set ns.placed = ns.placed + (message['content'].split('<image>') | length) - 1 -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{%- set ns.parts = ns.parts + 1 -%}
{%- elif part['type'] == 'text' -%}
{%- set ns.placed = ns.placed + (part['text'].split('<image>') | length) - 1 -%}
{%- else -%}
{{- raise_exception('only text and pictures can be read, not ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- set mark = '' if ns.parts == ns.placed else '<image>' -%}
{%- set pictures = ns.parts if ns.parts == ns.placed else ns.parts + ns.placed -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set piece = part['text'] if part['type'] == 'text' else mark -%}
{%- set turn.text = turn.text ~ ('\\n' if turn.text[-1:].strip() and piece[:1].strip() else '') ~ piece -%}
{%- endfor -%}
{%- endif -%}
{%- if pictures == 1 and '<image>' in turn.text -%}
{%- set turn.text = ('<image>\\n' ~ turn.text.replace('<image>', '').strip()).strip() -%}
{%- endif -%}
{%- set turn.text = turn.text.replace('<image>', IMAGE) -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set ns.system = turn.text -%}
{%- elif message['role'] in ('user', 'assistant') -%}
{%- if ns.turns or message['role'] == 'user' -%}
{%- if message['role'] != ('assistant' if ns.turns | length % 2 else 'user') -%}
{{- raise_exception('user and assistant must take turns') -}}
{%- endif -%}
{%- set ns.turns = ns.turns + [{'role': message['role'], 'content': turn.text}] -%}
{%- endif -%}
{%- else -%}
{{- raise_exception('a message of ' ~ message['role'] ~ ' cannot be written here') -}}
{%- endif -%}
{%- endfor -%}
"""
"""`messages` -> ns.system and ns.turns. Parts become a text as in data/typed_parts.py; where the texts have as many
`<image>` as there are pictures, these are the pictures' places, as in serving/protocol.py. A conversation's only
picture goes to the start of its turn, several stay where they are. A first turn of the assistant is dropped."""

DIALOGUE = """\
{%- for turn in ns.turns -%}
{{- USER if turn['role'] == 'user' else ASSISTANT -}}
{%- if turn['content'] -%}
{{- ' ' ~ turn['content'] ~ (' ' if turn['role'] == 'user' else END) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ASSISTANT -}}
{%- endif -%}
"""
BLOCKS = """\
{%- for turn in ns.turns -%}
{%- if turn['role'] == 'user' -%}
{{- BEFORE_USER ~ turn['content'] ~ AFTER_USER -}}
{%- else -%}
{{- BEFORE_ANSWER ~ turn['content'] ~ AFTER_ANSWER -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- PROMPT -}}
{%- endif -%}
"""


def trained_spec(checkpoint: Checkpoint) -> SampleSpec:
    """The sample spec of a checkpoint, its template "" for a model that was converted and not trained.

    Raises CheckpointError for a damaged file.
    """
    try:
        return SampleSpec.from_state(checkpoint.train_state())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path / TRAIN_STATE}: {error}; copy the checkpoint again") from None


def spec_of(checkpoint: Checkpoint, template: str | None, tokenizer: PreTrainedTokenizerBase) -> SampleSpec:
    """The spec of which an export writes the template: that of a --template, else the training's.

    Of several data sets, it is the first one's. Raises CheckpointError or TokenizerError.
    """
    spec = trained_spec(checkpoint)
    if template is not None:
        return with_template(spec, template, tokenizer)
    return replace(spec, template=spec.template.partition(",")[0])


def as_jinja(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase, gap: str = "") -> str | None:
    """The chat template that writes what a training with `spec` read; None for `plain`, which has no turns, and "".

    `gap`: see `gap_of`. It begins with BOS where the tokenizer adds one, because programs that render a chat template
    tokenize its text without special tokens. Raises TokenizerError.
    """
    if spec.template in ("", "plain"):
        return None
    try:
        style = template_of(spec, tokenizer)
    except KeyError as error:
        raise CheckpointError(f"its training had {error.args[0]}; give --template") from None
    image = (IMAGE_PLACEHOLDER_IN_TEXT if spec.mm_use_im_start_end else IMAGE_PLACEHOLDER).replace(
        IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER + gap
    )
    opening = ""
    if encode("", tokenizer) and (isinstance(style, Template) or style.adds_special_tokens):
        opening = "{{- bos_token" + f" ~ {_quoted(gap)}" * bool(gap) + " -}}\n"
    return _filled(TURNS, IMAGE=image) + opening + _body(style)


def gap_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to write after BOS and `<image>` so that the text after them has the ids that it has on its own.

    A SentencePiece tokenizer puts its mark for a space before a text; many do not after a special token, where a space
    has the same effect.
    """
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    if bos is None:
        return ""
    alone = backend.encode("A", add_special_tokens=False).ids
    after = backend.encode(f"{bos}A", add_special_tokens=False).ids[1:]
    return "" if alone == after else " "


def _body(style: Template | TurnTemplate | TokenizerTemplate) -> str:
    if isinstance(style, TokenizerTemplate):
        fixed = "".join(f"{{%- set {name} = {_quoted(str(value))} -%}}\n" for name, value in FIXED.items())
        system = "([{'role': 'system', 'content': ns.system}] if ns.system is not none else [])"
        return f"{fixed}{{%- set messages = {system} + ns.turns %}}{style.source}"
    if isinstance(style, TurnTemplate):
        before, _, after = style.user.partition(PLACE)
        return _system(style.default_system, style.system) + _filled(
            BLOCKS,
            BEFORE_USER=before,
            AFTER_USER=after,
            BEFORE_ANSWER=style.answer_start,
            AFTER_ANSWER=style.answer_end + style.separator,
            PROMPT=style.answer_start.rstrip(" "),
        )
    opening = _system(style.system, style.system_form, blank_is_none=True)
    if style.answer_start == ANSWER_START:
        names = {"USER": f"{ROLES['human']}:", "ASSISTANT": f"{ROLES['gpt']}:"}
        return opening + _filled(DIALOGUE, **names, END=style.round_end)
    return opening + _filled(
        BLOCKS,
        BEFORE_USER=HEADERS["human"],
        AFTER_USER=END_OF_TURN,
        BEFORE_ANSWER=HEADERS["gpt"],
        AFTER_ANSWER=END_OF_TURN,  # its round_end is no token, and is removed before a text is tokenized
        PROMPT=HEADERS["gpt"],
    )


def _system(default: str | None, form: str, blank_is_none: bool = False) -> str:
    """The lines that write the system text. default: what is written without one; form: "" refuses one."""
    before, _, after = form.partition(PLACE)
    write = (
        f"{{{{- {_quoted(before)} ~ ns.system ~ {_quoted(after)} -}}}}\n"
        if form
        else "{{- raise_exception('this model was trained without system texts') -}}\n"
    )
    if blank_is_none:
        write = f"{{%- if ns.system.strip() -%}}\n{write}{{%- endif -%}}\n"
    otherwise = ""
    if default:
        text = default if blank_is_none else f"{before}{default}{after}"
        otherwise = f"{{%- else -%}}\n{{{{- {_quoted(text)} -}}}}\n"
    elif default is not None and not blank_is_none:
        otherwise = f"{{%- else -%}}\n{{{{- {_quoted(before + after)} -}}}}\n"
    return f"{{%- if ns.system is not none -%}}\n{write}{otherwise}{{%- endif -%}}\n"


def _filled(lines: str, **texts: str) -> str:
    """`lines` with every name in capitals replaced by its text as a literal of Jinja."""
    names = "|".join(sorted(texts, key=len, reverse=True))
    return re.sub(rf"\b({names})\b", lambda found: _quoted(texts[found[1]]), lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
