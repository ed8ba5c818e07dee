"""A conversation in the terminal, with answers that are made up: what is asked, kept, stopped and refused."""

from __future__ import annotations

import io
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ross_mcore import ConversationError, Sampling
from ross_mcore.chat import session
from ross_mcore.chat.session import Conversation, talk
from ross_mcore.trained import Question

PICTURE = torch.zeros(3, 2, 2)


@dataclass
class Said:
    """What is answered, piece by piece, and the questions that came. A piece `^C` is a signal."""

    pieces: tuple[str, ...] = ("Yes", ", it", " is.")
    questions: list[Question] = field(default_factory=list)

    def stream(self, trained: Any, question: Question, sampling: Sampling, *, template: Any) -> Generator[str]:
        self.questions.append(question)
        if "refused" in str(question.conversations):
            raise ConversationError("it is refused")
        return self._pieces()

    def _pieces(self) -> Generator[str]:
        for piece in self.pieces:
            if piece == "^C":
                raise KeyboardInterrupt
            yield piece

    def turns(self, number: int) -> list[tuple[str, str]]:
        asked = self.questions[number].conversations
        assert not isinstance(asked, str)
        return [(turn["from"], turn["value"]) for turn in asked]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    made = Said()
    monkeypatch.setattr(session, "stream", made.stream)
    monkeypatch.setattr(Conversation, "show", lambda self, path: self.waiting.append(PICTURE))
    return made


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str, system: str | None = None) -> Conversation:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    conversation = Conversation(None, Sampling(), system=system)  # type: ignore[arg-type]  # no model is used
    talk(conversation)
    return conversation


def test_a_conversation_has_its_turns_and_pictures(
    said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("/image a.png", "What?", "", "/image b.png", "/image c.png", "Is <image> it?", "And?")
    typed(monkeypatch, *lines, system="Be brief.")
    assert said.turns(0) == [("system", "Be brief."), ("human", "<image>\nWhat?")]
    answered = ("gpt", "Yes, it is.")
    third = [*said.turns(0), answered, ("human", "<image>\nIs <image> it?"), answered, ("human", "And?")]
    assert said.turns(2) == third
    assert [len(question.pictures) for question in said.questions] == [1, 3, 3]
    assert capsys.readouterr().out.count("Yes, it is.\n") == 3


def test_errors_and_words_of_the_program_end_nothing(
    said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = typed(monkeypatch, "One", "<image>", "refused", "/image", "/what", "/reset", "Two", "/exit", "Three")
    out = capsys.readouterr().out
    for text in ("1 <image> in the question, 0 new pictures", "it is refused", "needs a file", "/exit  "):
        assert text in out
    assert said.turns(-1) == [("human", "Two")] and len(conversation.turns) == 2


def test_a_stopped_answer_is_kept_as_far_as_it_came(
    said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said.pieces = ("Ye\x1b[2J", "^C", "s")
    conversation = typed(monkeypatch, "What?", "And?")
    assert capsys.readouterr().out == "Ye?[2J (stopped)\n" * 2
    assert said.turns(1)[1] == ("gpt", "Ye\x1b[2J") and len(conversation.turns) == 4


def test_a_question_stopped_before_its_answer_is_not_kept(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    said.pieces = ("", "^C")
    conversation = typed(monkeypatch, "/image a.png", "What?")
    assert conversation.turns == conversation.pictures == [] and len(conversation.waiting) == 1
    said.pieces = ("",)
    assert typed(monkeypatch, "What?").turns[1]["value"] == ""


def test_input_that_is_not_utf8_is_refused(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Caf\xe9?\n"), encoding="utf-8"))
    with pytest.raises(ConversationError, match="standard input is not UTF-8: .*; convert it"):
        talk(Conversation(None, Sampling()))  # type: ignore[arg-type]  # no model is used
