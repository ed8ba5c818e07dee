"""Templates of turns: ChatML, a YAML file of one's own, and the tokenizer's own chat template.

Each writes a conversation and says which of its characters are answers. Labels are on the tokens of these characters,
so a template needs no arithmetic of tokens, and a turn may contain the template's own words. What a tokenizer makes of
special tokens in a turn's text is the same as in apply_chat_template: they are special tokens.
Legend: L tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ross_mcore import checked
from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, Dialogue
from ross_mcore.data.tokenizer import encode_with_places
from ross_mcore.errors import ConversationError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{text}"
SUFFIXES = (".yaml", ".yml")
KEYS = "user, answer_start, answer_end, system, default_system, separator"


class Written(NamedTuple):
    """A conversation as text, and the (start, end) of the characters to learn, in order."""

    text: str
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class TurnTemplate:
    """How turns are written; the fields are the keys of a YAML file.

    `{text}` is the text of the turn in `user` and `system`. An answer is `answer_start`, its text, `answer_end` and
    `separator`; text and `answer_end` are learned, unless the text is blank. `default_system` is the system text of a
    conversation without one; without it nothing is written. Raises ValueError.
    """

    user: str
    answer_start: str
    answer_end: str
    system: str = ""
    default_system: str | None = None
    separator: str = ""

    adds_special_tokens = True
    """Whether the tokenizer adds its own tokens, such as BOS."""

    def __post_init__(self) -> None:
        for key, text in asdict(self).items():
            if IMAGE_PLACEHOLDER in (text or ""):
                raise ValueError(f"{key} contains {IMAGE_PLACEHOLDER}, which is written by the turns")
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key} is not valid Unicode") from None
        for key, text in (("user", self.user), ("system", self.system)):
            if text.count(PLACE) != 1 and (text or key == "user"):
                raise ValueError(f"{key} is {checked.shown(text)}, expected text with {PLACE} once in it")
        if not self.answer_end:
            raise ValueError("answer_end is empty, so a model would not learn to end its answers")
        if self.default_system is not None and not self.system:
            raise ValueError("default_system needs system, which says how it is written")

    @classmethod
    def read(cls, path: Path) -> TurnTemplate:
        """The template of a YAML file. Raises TokenizerError."""
        try:
            return checked.build(cls, checked.read_yaml(path), "the template")
        except FileNotFoundError:
            raise TokenizerError(f"--template {path}: no such file; give a YAML file with the keys {KEYS}") from None
        except ValueError as error:
            raise TokenizerError(f"--template {path}: {error}; give a YAML file with the keys {KEYS}") from None

    def as_text(self) -> str:
        """The template on one line, from which `from_text` makes it again."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    @lru_cache(maxsize=16)
    def from_text(text: str) -> TurnTemplate:
        """Raises ValueError."""
        return checked.build(TurnTemplate, json.loads(text), "the template")

    def write(self, dialogue: Dialogue, generation: bool = False) -> Written:
        """The text of a conversation; with `generation`, up to the start of the next answer.

        A space before an answer is left to the answer, because many tokenizers merge it with the first word.
        Raises ConversationError for a system turn that the template has no place for.
        """
        system = self.default_system if dialogue.system is None else dialogue.system
        if system is not None and not self.system:
            raise ConversationError("the template has no place for a system turn")
        pieces = ["" if system is None else self.system.replace(PLACE, system)]
        length, answers = len(pieces[0]), []
        for role, text in dialogue.turns:
            if role == "human":
                pieces.append(self.user.replace(PLACE, text))
            else:
                start = length + len(self.answer_start)
                if text.strip():
                    answers.append((start, start + len(text) + len(self.answer_end)))
                pieces.append(f"{self.answer_start}{text}{self.answer_end}{self.separator}")
            length += len(pieces[-1])
        return Written("".join([*pieces, self.answer_start.rstrip(" ") if generation else ""]), answers)


CHATML = TurnTemplate(
    user="<|im_start|>user\n{text}<|im_end|>\n",
    answer_start="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    system="<|im_start|>system\n{text}<|im_end|>\n",
    default_system="You are a helpful assistant.",
    separator="\n",
)
"""The format of Qwen's own chat models, with Qwen2's default system text."""

ROLES = {"human": "user", "gpt": "assistant"}
MARK = "\ue000{}\ue001"
"""Stands for an answer while its place is looked for; private characters of Unicode."""
MARKS = re.compile("\ue000(\\d+)\ue001")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}
"""Variables of known chat templates: Llama's date, by default today's."""


@dataclass(frozen=True)
class TokenizerTemplate:
    """A tokenizer's own chat template (`source`, Jinja), rendered by transformers in Jinja's sandbox.

    `answer_end` follows every answer: what the template writes after one, up to its first special token. Answers are
    where {% generation %} says, else they are found by rendering the conversation with marks in their place. The prompt
    for an answer is the text before its mark, so that it is the same as in training.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    answer_end: str

    adds_special_tokens = False

    @staticmethod
    @lru_cache(maxsize=4)
    def of(tokenizer: PreTrainedTokenizerBase) -> TokenizerTemplate:
        """Raises TokenizerError for a tokenizer without a chat template, or with one that cannot be used."""
        where = f"--template tokenizer: the tokenizer {tokenizer.name_or_path}"
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            raise TokenizerError(
                f"{where} has no chat template; give another --template, or a YAML file (docs/data.md, Templates)"
            ) from None
        if "strftime_now" in source and "date_string" not in source:
            raise TokenizerError(
                f"{where} has a chat template that writes today's date, so tokens would change from day to day; write "
                "the template as a YAML file (docs/data.md, Templates)"
            )
        found = TokenizerTemplate(tokenizer, source, "")
        try:
            after = found._render(Dialogue(None, [("human", "Q"), ("gpt", MARK.format(0))])).rpartition("\ue001")[2]
            special = sorted((*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens), key=len, reverse=True)
            ends = re.search("|".join(map(re.escape, special)), after) if special else None
            found = TokenizerTemplate(tokenizer, source, after[: ends.end()] if ends else after.rstrip() or after)
            found.write(Dialogue(None, [("human", "Q"), ("gpt", "A")] * 2))
        except ConversationError as error:
            raise TokenizerError(f"{where} has a chat template that cannot be used: {error}") from None
        return found

    @property
    def digest(self) -> str:
        return digest_of(self.source)

    def write(self, dialogue: Dialogue, generation: bool = False) -> Written:
        """As TurnTemplate.write. Raises ConversationError for what the template refuses, or answers that it changes."""
        if generation:
            asked = dialogue._replace(turns=[*dialogue.turns, ("gpt", MARK.format(0))])
            return Written(MARKS.split(self._render(asked))[0].rstrip(" "), [])
        if GENERATION.search(self.source):
            return self._render_with_answers(dialogue)
        return self._find_answers(dialogue)

    def _find_answers(self, dialogue: Dialogue) -> Written:
        """The answers lie between the pieces of the text that is rendered with marks in their place."""
        answers = [text for role, text in dialogue.turns if role == "gpt"]
        marks = (MARK.format(number) for number in range(len(answers)))
        marked = [(role, next(marks) if role == "gpt" else text) for role, text in dialogue.turns]
        opening, *pieces = MARKS.split(self._render(dialogue._replace(turns=marked)))
        if list(map(int, pieces[::2])) != list(range(len(answers))):
            raise ConversationError("the chat template leaves out an answer")
        text, spans = self._render(dialogue), []
        place = len(opening) if text.startswith(opening) else -1
        for answer, after in zip(answers, pieces[1::2], strict=True):
            forms = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
            form = next((form for form in forms if place >= 0 and text.startswith(form + after, place)), None)
            if form is None:
                raise ConversationError("the chat template changes an answer")
            end = place + len(form)
            learned = end + len(self.answer_end) * after.startswith(self.answer_end)
            if form.strip():
                spans.append((place, learned))
            place = end + len(after)
        if place != len(text):
            raise ConversationError("the chat template changes an answer")
        return Written(text, spans)

    def _render(self, dialogue: Dialogue) -> str:
        return str(
            self._rendered(
                lambda messages: self.tokenizer.apply_chat_template(messages, tokenize=False, **FIXED), dialogue
            )
        )

    def _render_with_answers(self, dialogue: Dialogue) -> Written:
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**FIXED, **self.tokenizer.special_tokens_map}
        (text,), (spans,) = self._rendered(
            lambda messages: render_jinja_template(
                [messages], chat_template=self.source, return_assistant_tokens_mask=True, **variables
            ),
            dialogue,
        )
        return Written(text, [(start, end) for start, end in spans if start < end])

    def _rendered(self, render: Any, dialogue: Dialogue) -> Any:
        system = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
        messages = [*system, *({"role": ROLES[role], "content": text} for role, text in dialogue.turns)]
        try:
            return render(messages)
        except Exception as error:  # a template may raise anything
            raise ConversationError(f"the chat template refuses it: {checked.reason(error)}") from None


def digest_of(text: str) -> str:
    """8 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def labelled(
    written: Written, has_image: bool, tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> tuple[list[int], list[int]]:
    """(ids [L], labels [L]) of a text; a token is learned if one of its characters is.

    As in conversation.py:encode_text, `<image>` is a picture if `has_image`, the texts between pictures are tokenized
    separately, and only the first BOS is kept.
    """
    ids: list[int] = []
    labels: list[int] = []
    spans = [*written.answers, (len(written.text) + 1, len(written.text) + 1)]
    current = offset = skip = 0
    for number, piece in enumerate(written.text.split(IMAGE_PLACEHOLDER) if has_image else [written.text]):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            offset += len(IMAGE_PLACEHOLDER)
        found, places = encode_with_places(piece, tokenizer, special_tokens)
        if not number:
            skip = int(bool(found) and found[0] == tokenizer.bos_token_id and special_tokens)
        for token, (start, end) in list(zip(found, places))[skip if number else 0 :]:
            start, end = offset + start, offset + end
            while spans[current][1] <= start:
                current += 1
            first, last = spans[current]
            is_learned = first < end and start < last if start < end else first < start < last
            ids.append(token)
            labels.append(token if is_learned else IGNORE_INDEX)
        offset += len(piece)
    return ids, labels
