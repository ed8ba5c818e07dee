"""Pieces of HTML. Every text of a file goes through `text` or `cell`, which escape it and bound its length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ross_mcore.checked import printable

MOST_CHARACTERS = 600


def text(value: object, most: int = MOST_CHARACTERS) -> str:
    """A value from outside as HTML: one line without control characters, at most `most` characters."""
    shown = printable(str(value)[: most + 1].replace("\n", " ").replace("\t", " "))
    return escape(shown if len(shown) <= most else shown[: most - 3] + "...")


@dataclass(frozen=True)
class Row:
    """A row of a table: a header, and a cell of HTML for each column."""

    header: str
    cells: Sequence[str]
    differs: bool = False


def table(caption: str, columns: Iterable[str], rows: Iterable[Row]) -> str:
    """columns: HTML of the headers after the first, which is the caption."""
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr{" class=differs" if row.differs else ""}><th scope="row">{text(row.header)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in row.cells)}</tr>"
        for row in rows
    )
    head = f'<tr><th scope="col">{caption}</th>{heads}</tr>'
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def named(run: int, name: str) -> str:
    """A run's name with its colour."""
    return f'<span class="name"><i class="swatch s{run}"></i>{text(name, 100)}</span>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def section(title: str, *content: str) -> str:
    """A section, or nothing where there is no content."""
    return f"<section><h2>{title}</h2>{''.join(content)}</section>" if any(content) else ""
