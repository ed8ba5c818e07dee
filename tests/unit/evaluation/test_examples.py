"""The files under examples/evaluation: what lmms-eval, VLMEvalKit and `ross eval` are given."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import yaml

from ross_mcore.commands.eval import read_tasks
from ross_mcore.evaluation.run import Task

EXAMPLES = Path(__file__).parents[3] / "examples" / "evaluation"


def test_lmms_eval_and_ross_eval_ask_the_same_five_questions() -> None:
    class Loader(yaml.SafeLoader):
        """Reads `!function utils.pictures` as the name after it."""

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    task = yaml.load((EXAMPLES / "lmms_eval" / "shapes.yaml").read_text(), Loader)
    file = EXAMPLES.parents[1] / task["dataset_kwargs"]["data_files"]["test"]
    items = Task("short-answer", str(file)).items()
    spec = importlib.util.spec_from_file_location("utils", EXAMPLES / "lmms_eval" / "utils.py")
    assert spec is not None and spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert {task[key].partition(".")[2] for key in ("doc_to_visual", "process_results")} == {"pictures", "score"}
    for item, question in zip(items, json.loads(file.read_text()), strict=True):
        assert item.turns == (("human", f"<image>\n{question[task['doc_to_text']]}"),)
        assert utils.pictures(question)[0].size == (64, 64)
        right = question[task["doc_to_target"]]
        assert item.answers == (right,) and utils.score(question, [f" {right.title()}."]) == {"accuracy": 1.0}
        assert utils.score(question, ["nothing"]) == {"accuracy": 0.0}
    assert len(items) == 5


def test_the_suite_of_the_demo_is_one() -> None:
    tasks = read_tasks(argparse.Namespace(suite=EXAMPLES / "suite.yaml"))
    assert {name: task.benchmark for name, task in tasks.items()} == {
        "held-out": "short-answer",
        "unseen-pairs": "short-answer",
        "pictures": "reconstruction",
    }
