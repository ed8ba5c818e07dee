"""A conversation with a model in a terminal: lines of the human, streamed answers, pictures between them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ross_mcore import checked
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER
from ross_mcore.errors import ConversationError, ImageError, UserError
from ross_mcore.generation import Sampling, stream
from ross_mcore.trained import Question, TrainedModel, read_picture

MOST_CHARACTERS = 100_000
"""Of a line: more than a model has positions for."""
HELP = """/image FILE  shows a picture with the next question; several are shown in order, or at each <image> in it
/reset       begins a new conversation, without pictures
/exit        ends, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Conversation:
    """Turns and pictures so far, and the pictures that the next question shows."""

    trained: TrainedModel
    sampling: Sampling
    template: str | None = None
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    waiting: list[Tensor] = field(default_factory=list)

    def show(self, path: Path) -> None:
        """Reads a picture for the next question. Raises ImageError, OSError."""
        truncated = self.trained.spec.truncated_images
        self.waiting.append(read_picture(path, self.trained.preprocessing(), truncated))

    def reset(self) -> None:
        self.turns, self.pictures, self.waiting = [], [], []

    def ask(self, text: str, say: Callable[[str], None]) -> None:
        """Passes an answer to `say` in pieces, and keeps question and answer, also one that Ctrl-C stops after its
        first characters.

        Raises ConversationError for a question that cannot be asked, which is not kept; KeyboardInterrupt.
        """
        if len(text) > MOST_CHARACTERS:
            raise ConversationError(f"a question of {len(text)} characters, at most {MOST_CHARACTERS} are read")
        placed = text.count(IMAGE_PLACEHOLDER)
        if placed > len(self.waiting):
            raise ConversationError(
                f"{placed} {IMAGE_PLACEHOLDER} in the question, {len(self.waiting)} new pictures; /image FILE adds one"
            )
        text = f"{IMAGE_PLACEHOLDER}\n" * (len(self.waiting) - placed) + text
        asked = [*self.turns, {"from": "human", "value": text}]
        pictures = [*self.pictures, *self.waiting]
        opening = [{"from": "system", "value": self.system}] if self.system is not None else []
        pieces = stream(self.trained, Question([*opening, *asked], pictures), self.sampling, template=self.template)
        said, is_finished = "", False
        try:
            for piece in pieces:
                said += piece
                say(piece)
            is_finished = True
        finally:
            pieces.close()
            if said or is_finished:
                self.turns = [*asked, {"from": "gpt", "value": said}]
                self.pictures, self.waiting = pictures, []


def talk(conversation: Conversation) -> None:
    """Reads lines until Ctrl-D, /exit or the end of the input, and prints answers. Errors end only their own line.

    Raises ConversationError for input that is not UTF-8.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` arrow keys and a history

    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            say("\n" if prompt else "")
            return
        except UnicodeDecodeError as error:
            raise ConversationError(f"standard input is not UTF-8: {error.reason}; convert it, as by iconv") from None
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit ends)\n")
            continue
        if line == "/exit":
            return
        try:
            _obey(conversation, line)
        except KeyboardInterrupt:
            say(" (stopped)\n")
        except UserError as error:
            say(f"{checked.printable(str(error))}\n")
        except OSError as error:
            say(f"{checked.printable(str(error.filename))}: {checked.reason(error)}; give another file\n")


def _obey(conversation: Conversation, line: str) -> None:
    """Does what a line says. Raises UserError, OSError."""
    word, _, rest = line.partition(" ")
    if word == "/image":
        if not rest.strip():
            raise ImageError("/image needs a file: /image cat.jpg")
        conversation.show(Path(rest.strip().strip("'\"")).expanduser())
        say(f"({len(conversation.waiting)} picture(s) with the next question)\n")
    elif word == "/reset":
        conversation.reset()
        say("(a new conversation)\n")
    elif word.startswith("/"):
        say(f"{HELP}\n")
    elif line:
        conversation.ask(line, say)
        say("\n")


def say(text: str) -> None:
    """Prints a piece of text at once; control characters of an answer, which a terminal would obey, as `?`."""
    print("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text), end="", flush=True)
