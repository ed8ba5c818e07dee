"""The page of `ross report` in Chromium, and its size for long runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ross_mcore.commands.report import main
from tests.chromium import Page, needs_chromium
from tests.unit.run_report.made import HOSTILE, lines, make_run, metrics

pytestmark = pytest.mark.slow


def shown(page: Page, selector: str) -> list[bool]:
    """Whether each element of a selector is displayed."""
    found = page.run(f"[...document.querySelectorAll({selector!r})].map(e => getComputedStyle(e).display !== 'none')")
    assert found, f"nothing is {selector}"
    return list(found)


def click(page: Page, selector: str) -> None:
    page.run(f"document.querySelector({selector!r}).click()")


def hovered(page: Page, plot: int, share: float) -> Any:
    """The text beside the pointer at a share of the plot's width."""
    x, y = page.run(
        f"(() => {{ const plot = document.querySelectorAll('.plot')[{plot}]; plot.scrollIntoView({{block: 'center'}});"
        f" const box = plot.getBoundingClientRect(); return [box.x + {share} * box.width, box.y + 50]; }})()"
    )
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    return page.run("document.querySelector('.values')?.innerText")


@needs_chromium
def test_the_page_works_in_chromium(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", text=HOSTILE)]
    assert main([*map(str, runs), "--output", str(tmp_path / "report.html")]) == 0
    with Page(tmp_path / "profile", 1600, 1000) as page:
        page.go((tmp_path / "report.html").as_uri())
        assert page.run(
            "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.smooth').getAttribute('d'))"
        )
        assert page.run("document.querySelectorAll('.plot').length") > 6
        assert page.run("document.querySelectorAll('[src=x], [onerror]').length") == 0

        for selector, toggle in ((".log:not(.both)", "#log"), (".plot .raw", "#raw"), (".plot .s1", "#run1")):
            before = shown(page, selector)
            click(page, toggle)
            assert set(shown(page, selector)) == {not before[0]}, toggle
        assert not any(shown(page, ".lin:not(.both)"))
        click(page, "#run1")

        said = hovered(page, 0, 0.999)
        assert "near iteration 30" in said and "first: 0.0" in said and "second: 0.0" in said
        assert hovered(page, 0, 0.001).startswith("near iteration 1\n")
        page.run("document.querySelectorAll('.plot')[1].focus()")
        page.key("ArrowLeft")
        assert page.run("document.querySelectorAll('.plot')[1].innerText.includes('near iteration 29')")

        assert shown(page, ".strip figure") == [False, False, True] * 2
        page.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('.strip input'))")
        assert shown(page, ".strip figure") == [True, False, False] * 2
        assert page.run("[...document.querySelectorAll('.strip img')].every(i => i.naturalWidth === 12)")

        for width in (400, 1600):
            page.resize(width, 900)
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("performance.getEntriesByType('resource').length") == 0
        assert page.errors == []


def test_a_page_of_long_runs_stays_small(tmp_path: Path) -> None:
    noise = {f"figure{n}": 0.1 * n for n in range(40)}
    content = lines([metrics(n, **{k: (v * n**1.5) % 1 for k, v in noise.items()}) for n in range(1, 1001)])
    runs = [tmp_path / str(number) for number in range(8)]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(content)
    assert main([*map(str, runs), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert 1_000_000 < len(page) < 5_000_000 and "more figures are not drawn" in page
