"""Counts that a CPU can take of what a GPU would spend time on; `python benchmarks/counts.py` prints all of them.

A module of this package counts one kind of thing, in functions that tests assert on. Its `rows()` returns the lines of
the table that benchmarks/counts.py prints.
"""

from __future__ import annotations

from typing import NamedTuple

import ross_mcore  # noqa: F401  adapts megatron-core to this machine before a module of this package imports it


class Row(NamedTuple):
    """A line of the table.

    name: what was counted, and where; count: with its unit, such as "0" or "12.3 MB"; aim: the least possible, or the
    bound that a test asserts; meaning: one short phrase.
    """

    name: str
    count: str
    aim: str
    meaning: str
