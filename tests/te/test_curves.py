"""The picture of loss curves and the places of its elements."""

from __future__ import annotations

import xml.etree.ElementTree as xml

import pytest

from tests.te.curves import Curve, Panel, apart, differences, draw, even_ticks, log_ticks, smoothed


def test_means_and_differences() -> None:
    assert smoothed([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert differences([2, 2, 3], [1, 2, 2], 1) == [1, 0, 1]


def test_labels_do_not_cover_each_other() -> None:
    assert apart([10, 12, 50, 11], 5) == [10, 20, 50, 15]


def test_ticks_are_round_numbers() -> None:
    assert log_ticks(0.015, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert log_ticks(0.12, 0.19) == pytest.approx([0.12, 0.14, 0.16, 0.18])
    assert even_ticks(-1.2, 6.6, 4) == [0, 2, 4, 6]


def test_every_curve_is_drawn_twice_and_labelled() -> None:
    """In its panel, and below as a difference; the first, the reference, is labelled once."""
    values = [1.0, 0.5, 0.25, 0.2]
    curves = [Curve("a < b", "#000000", values), Curve("c", "#ff0000", [2 * v for v in values], is_dashed=True)]
    picture = xml.fromstring(draw("title", "more", [Panel("loss", curves), Panel("other", curves)], window=2))
    lines = [part for part in picture if part.tag.endswith("polyline")]
    assert len(lines) == 2 * 2 * 2
    texts = [part.text for part in picture if part.tag.endswith("text")]
    assert texts.count("a < b") == 1 and texts.count("+0.225") == 2 and texts.count("0.4500") == 2
