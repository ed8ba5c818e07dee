"""Evaluates a trained model on benchmarks: POPE, MMVP, MME, MMBench, other questions in tables, captions, and how well
pictures are reconstructed. docs/evaluation.md has the data of each benchmark and how it is scored.

  python tools/evaluate.py --load runs/finetune --benchmark pope --data POPE/coco --image-folder val2014 --out eval
  torchrun --nproc-per-node 8 tools/evaluate.py --load runs/finetune --suite suite.yaml --out eval
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.commands import TEMPLATE_HELP, build_parser, ending_cleanly, interrupted, refuse

if TYPE_CHECKING:
    from ross_mcore.evaluation.run import Task

SCRIPT = "evaluate.py"

EPILOG = """A suite is a YAML file of several benchmarks, each under a name of your own. Its keys are the options of one
benchmark, and paths are relative to the file:
  pope:
    benchmark: pope
    data: POPE/coco
    image_folder: val2014
  held-out:
    benchmark: short-answer
    data: shapes/heldout.json
    by: question_kind

Every process has the whole model and answers its share of the questions. Written into OUT: NAME/predictions.jsonl,
results.json and results.md. After an interruption, run the same command again: what is answered is kept,
and what was bad is asked again."""

NAMES = "pope, mmvp, mme, mmbench, multiple-choice, yes-no, short-answer, caption, reconstruction"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
OF_ONE = ("data", "image_folder", "suffix", "max_new_tokens", "by", "limit", "steps", "seed", "follow_links")


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="folder of a run or of a checkpoint")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of predictions and scores")
    add("--suite", type=Path, metavar="YAML", help="several benchmarks, see below; instead of the options of one")
    add("--dtype", choices=("float32", "bfloat16"), help="computes in this type [bfloat16 on a GPU, else float32]")
    add("--template", help=f"{TEMPLATE_HELP} [as in the run's training]")
    add("--batch-size", type=int, default=32, metavar="N", help="questions that are answered together [%(default)s]")
    one = parser.add_argument_group("one benchmark").add_argument
    one("--benchmark", metavar="NAME", help=NAMES)
    one("--data", metavar="PATH", help="its questions: a file, or a folder for pope, mmvp and reconstruction")
    one("--image-folder", metavar="DIR", help="folder of the pictures that questions name [--data, or its folder]")
    one("--follow-links", action="store_true", default=None, help="allow links that lead out of the picture folder")
    one("--suffix", metavar="TEXT", help='last line of every question, "" for none [as the reference asks]')
    one("--max-new-tokens", type=int, metavar="N", help="longest answer [128; mmvp 16]")
    one("--by", metavar="KEY", help="gives scores by this column or key too [category]")
    one(
        "--limit",
        type=int,
        metavar="N",
        help="the first questions only, and the rest of their groups (as mmvp's pairs)",
    )
    one("--steps", type=int, metavar="N", help="sampling steps of a reconstruction, up to 1000 [50]")
    one("--seed", type=int, help="seed of the reconstructions' noise [0]")
    options = parser.parse_args(arguments)
    given = [name for name in ("benchmark", *OF_ONE) if getattr(options, name) is not None]
    if (options.suite is None) == (options.benchmark is None):
        parser.error("give --benchmark and --data for one benchmark, or --suite for several")
    if options.suite is not None and given:
        parser.error(f"--{given[0].replace('_', '-')} belongs to one benchmark; write it into the file of --suite")
    if options.suite is None and options.data is None:
        parser.error("--data is missing: the questions of the benchmark")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return options


def read_tasks(options: argparse.Namespace) -> dict[str, Task]:
    """The benchmarks to run by name. Raises ConfigError."""
    from ross_mcore import checked
    from ross_mcore.errors import ConfigError
    from ross_mcore.evaluation.run import Task

    if options.suite is None:
        given = {name: getattr(options, name) for name in OF_ONE if getattr(options, name) is not None}
        tasks = {options.benchmark: Task(options.benchmark, **given)}
    else:
        try:
            entries = checked.mapping(checked.read_yaml(options.suite), "the file")
            placed = {str(name): _placed(entry, options.suite) for name, entry in entries.items()}
            tasks = {name: checked.build(Task, entry, name) for name, entry in placed.items()}
        except FileNotFoundError:
            raise ConfigError(f"{options.suite} does not exist; give a YAML file with benchmarks") from None
        except ConfigError as error:
            raise ConfigError(f"{options.suite}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{options.suite} cannot be read: {error}; --help shows an example") from None
        for name in tasks:
            if not NAME.fullmatch(name):
                raise ConfigError(f"{options.suite}: {checked.shown(name)} names a folder: letters, digits, . _ and -")
        if not tasks:
            raise ConfigError(f"{options.suite} has no benchmarks; --help shows an example")
    for task in tasks.values():
        if task.row.needs is not None and importlib.util.find_spec(task.row.needs) is None:
            raise ConfigError(f"{task.benchmark} needs {task.row.needs}: pip install {task.row.needs}")
    return tasks


def _placed(entry: Any, suite: Path) -> Any:
    """An entry of the suite with its paths relative to the working folder."""
    if not isinstance(entry, dict):
        return entry
    paths = {key: str(suite.parent / entry[key]) for key in ("data", "image_folder") if isinstance(entry.get(key), str)}
    return {**entry, **paths}


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from ross_mcore.errors import RankError, UserError

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with ending_cleanly():
            evaluate(options, is_first)
    except (UserError, OSError) as error:
        return refuse(prog, error) if is_first or not isinstance(error, RankError) else 2
    except KeyboardInterrupt:
        return interrupted(prog, f"what is answered is kept in {options.out}; run the same command to continue")
    return 0


def evaluate(options: argparse.Namespace, is_first: bool) -> None:
    """Runs the benchmarks, writes and prints their scores. Raises UserError and OSError."""
    import torch.distributed as dist
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore import platform
    from ross_mcore.evaluation.results import print_results, summarise, write_results
    from ross_mcore.evaluation.run import Evaluation
    from ross_mcore.launcher import require_rendezvous
    from ross_mcore.parallel.groups import left_as_found
    from ross_mcore.trained import load_model

    tasks = read_tasks(options)
    require_rendezvous()
    with left_as_found():
        platform.initialize_process_group(timeout_minutes=7 * 24 * 60)  # ranks wait for each other only at the end
        world_size = dist.get_world_size()
        dtype = options.dtype or ("bfloat16" if platform.has_gpu() else "float32")
        trained = load_model(options.load, dtype)
        evaluation = Evaluation(trained, dtype, options.template, options.batch_size)
        checkpoint = f"{options.load.name} iteration {trained.checkpoint.iteration}"
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        entries: list[dict[str, Any]] = []
        for name, task in tasks.items():
            with Progress(*columns, console=Console(stderr=True), disable=not is_first) as bars:
                bar = bars.add_task(name if world_size == 1 else f"{name}, share of rank 0", total=None)
                judged = evaluation.run(
                    task,
                    options.out / name,
                    lambda done, total: bars.update(bar, completed=done, total=total),  # noqa: B023  used in this turn
                )
            if is_first:
                entry = summarise(name, task.benchmark, checkpoint, task.row, judged)
                write_results(options.out, name, entry)
                entries.append(entry)
        if is_first:
            print_results(entries)
            print(f"wrote {options.out / 'results.md'}, results.json and the predictions of each")
