"""The folder of a benchmark: resumed with the same settings, refused with others; tables of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from ross_mcore.commands import eval as command
from ross_mcore.errors import ConfigError
from ross_mcore.evaluation.items import Item
from ross_mcore.evaluation.predictions import add_predictions, open_folder, read_predictions, write_judged
from ross_mcore.evaluation.results import markdown, summarise, write_results
from ross_mcore.evaluation.table import BENCHMARKS

SETTINGS = {"model": "iter_0000001 aa", "data": "2 questions, bb"}
ROW = BENCHMARKS["short-answer"]


def test_predictions_survive_an_interruption_and_a_cut_line(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "x"
    assert open_folder(folder, SETTINGS) == {}
    add_predictions(folder, 0, [{"id": "1", "text": "one"}])
    add_predictions(folder, 1, [{"id": "2", "text": "two"}])
    with (folder / "predictions.rank1.jsonl").open("a") as stream:
        stream.write('{"id": "3", "te')
    assert open_folder(folder, SETTINGS) == {"1": {"id": "1", "text": "one"}, "2": {"id": "2", "text": "two"}}
    assert sorted(file.name for file in folder.iterdir()) == ["predictions.jsonl", "settings.json"]
    add_predictions(folder, 0, [{"id": "3", "text": "three"}])
    assert list(open_folder(folder, SETTINGS)) == ["1", "2", "3"]


def test_what_was_bad_is_asked_again(tmp_path: Path) -> None:
    open_folder(tmp_path, SETTINGS)
    add_predictions(tmp_path, 0, [{"id": "1", "bad": "no file"}, {"id": "2", "text": "two"}])
    for _ in range(2):
        assert list(open_folder(tmp_path, SETTINGS)) == ["2"]
    add_predictions(tmp_path, 0, [{"id": "1", "text": "one"}])
    assert read_predictions(tmp_path)["1"] == {"id": "1", "text": "one"}


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    open_folder(tmp_path / "x", SETTINGS)
    with pytest.raises(ConfigError, match=r"/x has predictions with model iter_0000001 aa, and now it is iter_0000002"):
        open_folder(tmp_path / "x", {**SETTINGS, "model": "iter_0000002 cc"})
    (tmp_path / "x" / "settings.json").write_text("[")
    with pytest.raises(ConfigError, match=r"settings.json cannot be read: it is not JSON"):
        open_folder(tmp_path / "x", SETTINGS)
    (tmp_path / "x" / "settings.json").unlink()
    add_predictions(tmp_path / "x", 0, [{"id": "1", "text": "one"}])
    with pytest.raises(ConfigError, match=r"has predictions and no settings.json"):
        open_folder(tmp_path / "x", SETTINGS)


def test_tables_have_counts_scores_and_categories(tmp_path: Path) -> None:
    items = [Item(str(n), (("human", "?"),), (), ("two",), category="ab"[n % 2]) for n in range(3)]
    predictions = {"0": {"id": "0", "text": "two"}, "1": {"id": "1", "text": "one"}, "2": {"id": "2", "bad": "cut"}}
    judged = ROW.judge(items, predictions)
    open_folder(tmp_path / "mine", SETTINGS)
    write_judged(tmp_path / "mine", judged)
    entry = summarise("mine", "short-answer", "run iteration 5", ROW, judged)
    write_results(tmp_path, "mine", entry)
    assert json.loads((tmp_path / "results.json").read_text()) == [entry]
    assert (
        (tmp_path / "results.md").read_text()
        == markdown(entry)
        == (
            "## mine (short-answer): run iteration 5, 3 questions; 1 bad, wrong\n\n"
            "|  | questions | accuracy |\n| --- | --: | --: |\n| all | 3 | 33.3 |\n| a | 2 | 50.0 |\n| b | 1 | 0.0 |\n"
        )
    )
    assert '"read": "one", "right": false' in (tmp_path / "mine" / "predictions.jsonl").read_text()


def test_the_help_names_all_benchmarks() -> None:
    assert ", ".join(BENCHMARKS) == command.NAMES


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --benchmark and --data for one benchmark, or --suite"),
        (["--benchmark", "pope"], "--data is missing"),
        (["--suite", "s.yaml", "--limit", "3"], "--limit belongs to one benchmark"),
        (["--benchmark", "pope", "--data", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_options_that_do_not_fit(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(["--load", "run", "--out", "out", *words])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x: {benchmark: pope, data: d, lmit: 3}", "unknown key 'lmit'"),
        ("x: {benchmark: pope}", "x has no key 'data'"),
        ("x: {benchmark: pop, data: d}", "suite.yaml: --benchmark 'pop' is unknown"),
        ("../x: {benchmark: pope, data: d}", r"'\.\./x' names a folder"),
        ("{}", "has no benchmarks"),
        ("[1]", "the file is .*expected a mapping"),
    ],
)
def test_a_malformed_suite_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        command.read_tasks(argparse.Namespace(suite=tmp_path / "suite.yaml"))


def test_paths_of_a_suite_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("x: {benchmark: yes-no, data: d.tsv, limit: 3}")
    task = command.read_tasks(argparse.Namespace(suite=tmp_path / "suite.yaml"))["x"]
    assert (task.data, task.limit) == (str(tmp_path / "d.tsv"), 3)
