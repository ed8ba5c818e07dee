"""The whole trainer on a laptop: scenes -> shards -> conversion -> two training stages on four ranks -> answers.

Trains a small ROSS model at tensor 2 x pipeline 2 on the CPU, stops it in the middle and resumes it, asks it about
pictures it was not trained on, and draws the reconstructions from its image states. It ends with a table, and exits
non-zero if one of its checks fails. All output is under --out.

    python examples/demo/run_demo.py --out runs/demo
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.errors import UserError

if TYPE_CHECKING:
    from ross_mcore.trained import TrainedModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WEIGHTS = HERE / "weights"
EXAMPLES_KEPT = 8

LEAST_HELD_OUT, LEAST_UNSEEN, LEAST_NAMED = 0.90, 0.80, 0.90
SAME_STEP, LEAST_SIZE = 1e-5, 0.01
"""Largest difference of losses and gradient norm of layouts, which add float32 in other orders: relative to the value,
or to this size where it is smaller. A loss near zero is a difference of logits, whose rounding does not shrink with it.
"""
GUESSING_MARGIN = 0.10
"""Allowed accuracy above guessing with a blank picture: noise over a few hundred questions."""


class DemoError(UserError, RuntimeError):
    """A step of the demo that failed; the message says which."""


class Clock:
    """Wall-clock seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        print(f"\n== {step}", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began


def run(command: Sequence[str | Path]) -> None:
    """Prints a command and runs it from the top of the repository. Raises DemoError if it fails."""
    print(f"$ {_shown(command)}", flush=True)
    status = subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode
    if status:
        raise DemoError(f"`{_shown(command)}` ended with status {status}")


def _shown(command: Sequence[str | Path]) -> str:
    """The command as typed in a shell."""
    words = [str(word).removeprefix(f"{ROOT}/") for word in command]
    return (
        shlex.join(words)
        .replace(f"{sys.executable} -m torch.distributed.run", "torchrun", 1)
        .replace(sys.executable, "python", 1)
    )


def training_command(stage: str, load: Path, out: Path, ranks: int, iterations: int | None) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "pretrain_ross.py", "--config", HERE / f"{stage}.yaml"]
    command += ["--load", load, "--data-path", out / "shards" / stage, "--save", out / stage]
    return command + (["--train-iters", str(iterations)] if iterations else [])


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    from ross_mcore.logs import METRICS_FILE, read_entries

    path = run_folder / METRICS_FILE
    return list(read_entries(path)) if path.exists() else []


def train_and_interrupt(command: list[str | Path], run_folder: Path, at_iteration: int) -> int:
    """Starts a training, sends its ranks SIGTERM once `at_iteration` steps are logged; the iteration they saved.

    Raises DemoError unless every rank ended with status 0 and left a checkpoint.
    """
    import psutil

    from ross_mcore.checkpoint.folder import find_checkpoint

    print(f"$ {_shown(command)}   # stopped with SIGTERM on the way", flush=True)
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, start_new_session=True)
    metrics = run_folder / "metrics.jsonl"
    try:
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= at_iteration:
                for rank in psutil.Process(process.pid).children():
                    rank.send_signal(signal.SIGTERM)
                break
            time.sleep(0.2)
        status = process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    found = find_checkpoint(run_folder)
    if status or found is None:
        raise DemoError(f"the interrupted training ended with status {status}; its checkpoint: {found}")
    return found.iteration


def check_stream(run_folder: Path, shards: Path, seed: int) -> bool:
    """Whether every iteration is logged once and was trained on the samples given by the order function."""
    from ross_mcore.data.order import BlockOrder, sample_digest
    from ross_mcore.data.shard_reader import ShardReader

    entries, reader = metrics_of(run_folder), ShardReader(shards)
    order, start = BlockOrder(len(reader), seed), 0
    for number, entry in enumerate(entries, start=1):
        numbers = order.sample_at(range(start, entry["consumed_samples"]))
        start = entry["consumed_samples"]
        if entry["iteration"] != number or entry["sample_digest"] != sample_digest(reader.keys(numbers)):
            return False
    return bool(entries)


def repeat_one_step(out: Path, iteration: int, train_iters: int) -> float:
    """Continues the checkpoint of `iteration` in this one process for a step; largest relative difference to the run.

    The run took that step on four ranks after its restart; losses and gradient norm must be the same here.
    """
    from ross_mcore.commands.train import train_status
    from ross_mcore.flags import parse

    folder = out / "resume_check"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = ["--config", str(HERE / "finetune.yaml"), "--train-iters", str(train_iters)]
    arguments += ["--load", str(out / "finetune" / f"iter_{iteration:07d}"), "--save", str(folder)]
    arguments += ["--data-path", str(out / "shards" / "finetune"), "--exit-duration-in-mins", "1e-6"]
    arguments += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    if train_status(parse(arguments)):
        raise DemoError("the checkpoint could not be continued in one process")
    here, there = metrics_of(folder)[0], metrics_of(out / "finetune")[iteration]
    if here["sample_digest"] != there["sample_digest"] or here["iteration"] != there["iteration"]:
        return float("inf")
    names = ("lm_loss", "vm_loss", "grad_norm")
    pairs = [(here[name], there[name]) for name in names]
    if any((ours is None) != (theirs is None) for ours, theirs in pairs):  # None: a loss over nothing
        return float("inf")
    return max(abs(ours - theirs) / max(abs(theirs), LEAST_SIZE) for ours, theirs in pairs if theirs is not None)


def accuracy(trained: TrainedModel, records: list[dict[str, Any]], folder: Path) -> tuple[float, list[str]]:
    """Share of questions answered with exactly the right word, and all answers."""
    from ross_mcore.generation import answer
    from ross_mcore.trained import Question, read_picture

    preprocessing = trained.preprocessing("square")
    pictures = {path: read_picture(folder / path, preprocessing) for path in {r["image"] for r in records}}
    questions = [Question(record["conversations"][:1], [pictures[record["image"]]]) for record in records]
    answers = answer(trained, questions, "qwen_2", max_new_tokens=4, batch_size=100, stop=["<|im_end|>"])
    right = [given == record["conversations"][1]["value"] for given, record in zip(answers, records, strict=True)]
    return sum(right) / len(right), answers


def reconstruct_scenes(
    trained: TrainedModel, records: list[dict[str, Any]], data: Path, output: Path
) -> dict[str, float]:
    """Draws pictures of them; share of shapes and colours named rightly in samples, and after a VAE round trip."""
    import torch
    from figures import PICTURES_DENOISED, draw_denoising, draw_grid, shown_of
    from scenes import Scene
    from templates import share_named_rightly

    from ross_mcore.inference import as_picture, reconstruct
    from ross_mcore.trained import read_picture

    by_picture = {record["image"]: record["scene"] for record in records}
    scenes = [Scene(**{name: _as_tuples(value) for name, value in scene.items()}) for scene in by_picture.values()]
    preprocessing = trained.preprocessing("square")
    pixels = [read_picture(data / path, preprocessing) for path in by_picture]
    originals, samples = reconstruct(trained, pixels, batch_size=64)
    with torch.no_grad():
        decoder = trained.model.pixel_decoder
        round_trip = decoder.decode(decoder.encode(torch.stack(pixels), None))
    draw_grid(originals, samples, output / "reconstruction.png")
    draw_denoising(trained, pixels[shown_of(len(pixels))][:PICTURES_DENOISED], output / "denoising.png")
    return {
        "samples": share_named_rightly([as_picture(image) for image in samples], scenes),
        "vae_round_trip": share_named_rightly([as_picture(image) for image in round_trip], scenes),
    }


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def first_and_last_losses(out: Path) -> dict[str, dict[str, float]]:
    """Losses of each stage at its first step, and averaged over its last ones."""
    losses = {}
    for stage in ("pretrain", "finetune"):
        entries = metrics_of(out / stage)
        window = max(1, min(20, len(entries) // 4))
        for name in ("lm_loss", "vm_loss"):
            values = [entry[name] for entry in entries if entry[name] is not None]  # null: over nothing
            last = values[-window:]
            losses[f"{stage} {name}"] = {"first": values[0], "last": sum(last) / len(last)}
    return losses


def evaluate(out: Path, interrupted_at: int, train_iters: int) -> dict[str, Any]:
    """All figures of summary.json except the times."""
    import torch
    from figures import draw_curves_of
    from scenes import guessing_rate

    from ross_mcore.parallel import groups
    from ross_mcore.trained import load_model

    torch.set_num_threads(2)
    data = out / "data"
    sets = {
        name: json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("heldout", "unseen_pairs", "grey")
    }
    summary: dict[str, Any] = {"accuracy": {}}
    for moment, stage in (("before", "pretrain"), ("after", "finetune")):
        trained = load_model(out / stage)
        for name, records in sets.items():
            share, answers = accuracy(trained, records, data)
            entry = summary["accuracy"].setdefault(
                name, {"questions": len(records), "guessing": guessing_rate(records)}
            )
            entry[moment] = share
            if name == "heldout" and moment == "after":
                summary["examples"] = [
                    {
                        "image": record["image"],
                        "question": record["conversations"][0]["value"].removeprefix("<image>\n"),
                        "answer": given,
                        "right": record["conversations"][1]["value"],
                    }
                    for record, given in list(zip(records, answers))[:EXAMPLES_KEPT]
                ]
    summary["named_rightly"] = reconstruct_scenes(trained, sets["heldout"], data, out)
    summary["losses"] = first_and_last_losses(out)
    draw_curves_of(out, interrupted_at, out / "demo_curves.svg")
    groups.destroy()
    summary["resume"] = {
        "stopped_after_iteration": interrupted_at,
        "iterations": train_iters,
        "same_samples": check_stream(out / "finetune", out / "shards" / "finetune", seed=42),
        "largest_difference_in_one_process": repeat_one_step(out, interrupted_at, train_iters),
    }
    return summary


def checks(summary: dict[str, Any]) -> dict[str, bool]:
    """The demo's checks."""
    accuracies, named, resume = summary["accuracy"], summary["named_rightly"], summary["resume"]
    grey = accuracies["grey"]
    return {
        "both losses fall in both stages": all(entry["last"] < entry["first"] for entry in summary["losses"].values()),
        f"held-out pictures above {LEAST_HELD_OUT:.0%}": accuracies["heldout"]["after"] > LEAST_HELD_OUT,
        f"unseen colour-shape pairs above {LEAST_UNSEEN:.0%}": accuracies["unseen_pairs"]["after"] > LEAST_UNSEEN,
        "blanked picture no better than guessing": grey["after"] <= grey["guessing"] + GUESSING_MARGIN,
        f"samples named rightly, at least {LEAST_NAMED:.0%}": named["samples"] >= LEAST_NAMED,
        "stopped and resumed on the same samples": resume["same_samples"]
        and 0 < resume["stopped_after_iteration"] < resume["iterations"],
        f"the step after the restart is the same in one process ({SAME_STEP:g})": (
            resume["largest_difference_in_one_process"] <= SAME_STEP
        ),
    }


def show(summary: dict[str, Any], out: Path) -> None:
    """The table at the end."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width))
    table = Table("losses", "first step", "end of stage", title="demo: small ROSS at tensor 2 x pipeline 2 on the CPU")
    for name, entry in summary["losses"].items():
        table.add_row(name, f"{entry['first']:.3g}", f"{entry['last']:.3g}")
    console.print(table)
    table = Table("questions with one-word answers", "number", "guessing", "after pretrain", "after finetune")
    titles = {"heldout": "held-out pictures", "unseen_pairs": "unseen colour-shape pairs", "grey": "blanked picture"}
    for name, title in titles.items():
        entry = summary["accuracy"][name]
        shares = [f"{entry[key]:.1%}" for key in ("guessing", "before", "after")]
        table.add_row(title, str(entry["questions"]), *shares)
    console.print(table)
    for example in summary["examples"][:4]:
        line = f"  {example['image']}: {example['question']} -> {example['answer']} ({example['right']})"
        console.print(line, highlight=False, markup=False)
    named = summary["named_rightly"]
    table = Table("reconstruction", "shapes and colours named rightly by the nearest of 31 templates")
    table.add_row("sampled from the image states", f"{named['samples']:.1%}")
    table.add_row("VAE round trip", f"{named['vae_round_trip']:.1%}")
    console.print(table)
    table = Table("check", "")
    for name, passed in summary["checks"].items():
        table.add_row(name, "[green]ok[/]" if passed else "[red]FAILED[/]")
    console.print(table)
    table = Table("where the time went", "seconds")
    for step, seconds in summary["seconds"].items():
        table.add_row(step, f"{seconds:.0f}")
    table.add_row("total", f"{sum(summary['seconds'].values()):.0f}")
    console.print(table)
    console.print(
        "Pre-trained before the demo, by scripts in its folder: the VAE on such pictures, the vision tower on"
    )
    console.print("such pictures with their labels, the language model on text about such scenes without pictures.")
    print(
        f"Open {out}/reconstruction.png (pictures over what the image states reconstruct), denoising.png (its steps),"
    )
    print("demo_curves.svg and summary.json beside it. Next (`ross` is in .venv/bin after `make demo`):")
    for command in next_commands(out):
        print(f"  {command}")


def next_commands(out: Path) -> list[str]:
    """What can be done with the trained model."""
    model, picture = out / "finetune", out / "data" / "images" / "heldout" / "00000.png"
    return [
        f"ross chat --load {model} --image {picture}",
        f"ross serve --load {model}",
        f"ross report {out / 'pretrain'} {model} --output {out / 'report.html'}",
        f"ross export --load {model} --save {out / 'llava'} --format llava",
        f"tensorboard --logdir {out}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything [%(default)s]")
    parser.add_argument("--ranks", type=int, default=4, help="processes; a multiple of 4 [%(default)s]")
    parser.add_argument("--eval-seed", type=int, default=20, help="draws the held-out pictures [%(default)s]")
    parser.add_argument(
        "--short", action="store_true", help="a dozen steps a stage: runs every step, checks no accuracy"
    )
    parser.add_argument("--only-pretrain", action="store_true", help="end after the first stage")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists():
        shutil.rmtree(out)
    iterations = 12 if options.short else None
    clock = Clock()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # four ranks without four GPUs
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per rank: there are more ranks than cores
    sys.path[:0] = [str(HERE)]
    try:
        with clock.measure("scenes and shards"):
            count = 64 if options.short else 3000
            scenes: list[str | Path] = [sys.executable, HERE / "scenes.py", "--out", out / "data"]
            scenes += ["--count", str(count), "--eval-seed", str(options.eval_seed)]
            run(scenes)
            for stage in ("pretrain", "finetune"):
                shards = [sys.executable, "tools/make_shards.py", "--data", out / "data" / f"{stage}.json"]
                run([*shards, "--image-folder", out / "data", "--out", out / "shards" / stage])
        with clock.measure("conversion of language model, tower and VAE"):
            command: list[str | Path] = [sys.executable, "tools/convert_hf_to_mcore.py"]
            command += ["--language-model", WEIGHTS / "language_model"]
            command += ["--tokenizer", WEIGHTS / "tokenizer", "--vision-model", WEIGHTS / "vision_model"]
            command += ["--pixel-decoder", WEIGHTS / "pixel_decoder", "--denoiser-width", "96", "--save", out / "base"]
            run(command)
        with clock.measure("pretrain, 4 ranks"):
            run(training_command("pretrain", out / "base", out, options.ranks, iterations))
        if options.only_pretrain:
            return 0
        with clock.measure("finetune, 4 ranks, stopped in the middle and resumed"):
            command = training_command("finetune", out / "pretrain", out, options.ranks, iterations)
            train_iters = iterations or read_train_iters(HERE / "finetune.yaml")
            interrupted_at = train_and_interrupt(command, out / "finetune", train_iters // 2)
            run(command)
        with clock.measure("answers, reconstruction and resume check, 1 process"):
            summary = evaluate(out, interrupted_at, train_iters)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    summary["seconds"] = {step: round(seconds, 1) for step, seconds in clock.seconds.items()}
    summary["checks"] = checks(summary)
    if options.short:  # too few steps to learn: only checks without accuracy remain
        summary["checks"] = {
            name: ok for name, ok in summary["checks"].items() if "resumed" in name or "restart" in name
        }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    show(summary, out)
    return 0 if all(summary["checks"].values()) else 1


def read_train_iters(recipe: Path) -> int:
    """Iterations of a recipe."""
    import yaml

    return int(yaml.safe_load(recipe.read_text(encoding="utf-8"))["train-iters"])


if __name__ == "__main__":
    raise SystemExit(main())
