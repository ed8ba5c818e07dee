"""Does reconstruction help? Trains the demo's model with and without vm_loss and compares answers about new pictures.

Every setting of the table trains both stages from the same weights, on the same samples in the same order, for each
seed; the pictures are those of hard_scenes.py, seen by a frozen tower whose input is blurred. It prints accuracy with
its spread over seeds, the differences seed by seed, and draws them. docs/evaluation.md says what this shows and what
not.
Finished runs are kept: the same command continues after a stop.

    python examples/demo/ablation.py --out runs/ablation --picture docs/ablation.svg
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from run_demo import HERE, ROOT, WEIGHTS, DemoError, metrics_of

BLUR_PIXELS = 4
RESULT = "result.json"
STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Setting:
    """One way to train: whether the model has VAE and denoiser, and options of training beside the recipes'."""

    name: str
    with_denoiser: bool = False
    options: tuple[str, ...] = ()


SETTINGS = (
    Setting("lm_loss"),  # no VAE, hence no denoiser: a LLaVA model
    Setting("lm_loss + vm_loss", with_denoiser=True),
)
"""The first is the baseline of the differences. The projector's first weights do not depend on the other parts."""


@dataclass(frozen=True)
class Size:
    """How much is trained and asked: pictures, iterations of both stages and of the VAE, samples of an iteration."""

    pictures: int = 3000
    held_out: int = 300
    pretrain: int = 500
    finetune: int = 600
    batch: int = 16
    vae: int = 700
    blur: int = BLUR_PIXELS


QUICK = Size(pictures=48, held_out=4, pretrain=2, finetune=2, batch=4, vae=2)


@dataclass(frozen=True)
class Run:
    """One setting with one seed, in a folder of its own."""

    setting: Setting
    seed: int
    out: Path
    size: Size

    @property
    def folder(self) -> Path:
        return self.out / f"{self.setting.name.replace(' ', '')}-seed{self.seed}"

    @property
    def iterations(self) -> int:
        """Iterations logged by both stages."""
        return sum(len(metrics_of(self.folder / stage)) for stage in STAGES)

    def result(self) -> dict[str, Any] | None:
        """What `measure` found, and the CPU seconds of training; None before the run is finished."""
        file = self.folder / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def make(self) -> None:
        """Converts, trains both stages and asks the questions, each unless it is done. Raises DemoError."""
        if self.result() is not None:
            return
        log = self.folder.with_suffix(".log")
        base = self.folder / "base"
        if not has_checkpoint(base, 0):
            command: list[str | Path] = ["tools/convert_hf_to_mcore.py", "--language-model", WEIGHTS / "language_model"]
            command += ["--tokenizer", WEIGHTS / "tokenizer", "--vision-model", self.out / "tower"]
            if self.setting.with_denoiser:
                command += ["--pixel-decoder", self.out / "pixel_decoder", "--denoiser-width", "96"]
            run_python([*command, "--seed", str(self.seed), "--save", base, "--overwrite"], log)
        load, seconds = base, 0.0
        for stage in STAGES:
            iterations = getattr(self.size, stage)
            if not has_checkpoint(self.folder / stage, iterations):
                seconds += run_python(self.training_command(stage, load), log)
            if not has_checkpoint(self.folder / stage, iterations):
                raise DemoError(f"{self.folder / stage} was stopped early; the same command continues it")
            load = self.folder / stage
        measured = self.folder / "measured.json"
        run_python([HERE / "ablation.py", "--measure", load, "--out", self.out, "--result", measured], log)
        result = {**json.loads(measured.read_text(encoding="utf-8")), "cpu_seconds": round(seconds, 1)}
        write_json(self.folder / RESULT, result)

    def training_command(self, stage: str, load: Path) -> list[str | Path]:
        command: list[str | Path] = ["pretrain_ross.py", "--config", HERE / f"{stage}.yaml", "--load", load]
        command += ["--data-path", self.out / "shards" / stage, "--save", self.folder / stage]
        command += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        command += ["--micro-batch-size", str(self.size.batch), "--global-batch-size", str(self.size.batch)]
        command += ["--train-iters", str(getattr(self.size, stage)), "--seed", str(self.seed)]
        command += ["--clip-grad", "0"]  # as in the paper: the norm of one loss must not scale the other's gradient
        return command + list(self.setting.options)


def run_python(arguments: Sequence[str | Path], log: Path) -> float:
    """Runs Python in one thread from the top of the repository; its CPU seconds. Raises DemoError if it fails."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        shown = " ".join(map(str, arguments)).replace(f"{ROOT}/", "")
        raise DemoError(f"`python {shown}` ended with status {process.returncode}; its output is in {log}")
    return usage.ru_utime + usage.ru_stime


def has_checkpoint(folder: Path, iteration: int) -> bool:
    from ross_mcore.checkpoint.folder import find_checkpoint

    found = find_checkpoint(folder)
    return found is not None and found.iteration == iteration


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def blur_tower(source: Path, target: Path, pixels: int) -> None:
    """Writes a tower that sees only the mean colour of each square of `pixels` x `pixels`.

    Its first layer is a convolution over patches, so averaging that layer's weights within each square is the same as
    averaging the picture there.
    """
    from torch.nn import functional
    from transformers import AutoImageProcessor, SiglipVisionModel

    tower = SiglipVisionModel.from_pretrained(source)
    weight = tower.embeddings.patch_embedding.weight
    means = functional.avg_pool2d(weight.detach(), pixels)
    weight.data.copy_(means.repeat_interleave(pixels, 2).repeat_interleave(pixels, 3))
    tower.save_pretrained(target)
    AutoImageProcessor.from_pretrained(source).save_pretrained(target)


def adapt_vae(source: Path, target: Path, steps: int) -> None:
    """Writes a VAE trained further on sharp pictures of this task, without labels.

    The demo's VAE cannot hold these colours and small shapes, and a target without the detail could not teach it.
    """
    import torch
    from diffusers import AutoencoderKL
    from hard_scenes import draw_scene, sample_scene, sample_scenes
    from make_vae import build_parser, normalise_latents, stack_pixels, train

    torch.manual_seed(21)
    vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False).float()
    train(
        vae,
        build_parser().parse_args(["--out", str(target), "--steps", str(steps)]),
        draw=lambda rng: draw_scene(sample_scene(rng)),
    )
    normalise_latents(vae, stack_pixels([draw_scene(scene) for scene in sample_scenes(200, "vae/latents")]))
    vae.half().save_pretrained(target)


def prepare(out: Path, size: Size) -> None:
    """Writes pictures, questions, shards, the blurred tower and the VAE, unless they are there. Raises DemoError."""
    import hard_scenes

    done = out / "size.json"
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8")) != asdict(size):
            raise DemoError(f"{out} holds runs of another size; give another --out")
        return
    shutil.rmtree(out / "shards", ignore_errors=True)  # of a preparation that was stopped
    hard_scenes.write_dataset(out / "data", size.pictures, size.held_out, seed=1)
    for stage in STAGES:
        command: list[str | Path] = ["tools/make_shards.py", "--data", out / "data" / f"{stage}.json"]
        run_python([*command, "--image-folder", out / "data", "--out", out / "shards" / stage], out / "shards.log")
    blur_tower(WEIGHTS / "vision_model", out / "tower", size.blur)
    adapt_vae(WEIGHTS / "pixel_decoder", out / "pixel_decoder", size.vae)
    write_json(done, asdict(size))


def measure(run_folder: Path, data: Path) -> dict[str, dict[str, float]]:
    """Shares of right answers by kind, about the held-out pictures and about a blank one."""
    from hard_scenes import KINDS

    import ross_mcore

    trained = ross_mcore.load_model(run_folder)
    shares = {}
    for name in ("heldout", "grey"):
        records = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        questions = [ross_mcore.Question(r["conversations"][:1], [data / r["image"]]) for r in records]
        answers = ross_mcore.answer(trained, questions, max_new_tokens=8, batch_size=100)
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for record, given in zip(records, answers, strict=True):
            right[record["kind"]].append(given == record["conversations"][1]["value"])
        shares[name] = {kind: sum(rights) / len(rights) for kind, rights in right.items()}
    return shares


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Makes the runs, `jobs` at a time, with a progress bar over the iterations of all. Raises DemoError."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = sum(run.size.pretrain + run.size.finetune for run in runs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool, failed = ThreadPoolExecutor(max_workers=jobs), Event()

    def make(run: Run) -> None:
        if failed.is_set():
            return
        try:
            run.make()
        except BaseException:
            failed.set()
            raise

    try:
        with Progress(*columns) as progress:
            task = progress.add_task(f"{len(runs)} runs", total=total)
            pending = {pool.submit(make, run) for run in runs}
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                progress.update(task, completed=sum(run.iterations for run in runs))
                for future in done:
                    future.result()
    finally:
        failed.set()
        pool.shutdown(cancel_futures=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder for everything [%(default)s]")
    parser.add_argument("--picture", type=Path, help="SVG to write, beside the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="[1 2 3]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each [%(default)s]")
    parser.add_argument(
        "--iterations", type=int, nargs=2, metavar=("PRETRAIN", "FINETUNE"), help="of each stage [500 600]"
    )
    parser.add_argument("--quick", action="store_true", help="two iterations a stage: runs every step, learns nothing")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    out, size = options.out.resolve(), QUICK if options.quick else Size()
    if options.iterations:
        size = replace(size, pretrain=options.iterations[0], finetune=options.iterations[1])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path[:0] = [str(HERE)]
    if options.measure:
        write_json(options.result, measure(options.measure, out / "data"))
        return 0
    from ablation_results import Results, draw, show, summary
    from hard_scenes import guessing_rates

    try:
        prepare(out, size)
        seeds = list(dict.fromkeys(options.seeds))
        runs = [Run(setting, seed, out, size) for seed in seeds for setting in SETTINGS]
        train_all(runs, options.jobs)
    except DemoError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ablation: stopped; the same command continues", file=sys.stderr)
        return 130
    heldout = json.loads((out / "data" / "heldout.json").read_text(encoding="utf-8"))
    found = [(run.setting.name, run.seed, run.result() or {}) for run in runs]
    results = Results.of(found, guessing_rates(heldout), questions=len(heldout))
    write_json(out / "summary.json", summary(results))
    show(results)
    if options.picture:
        options.picture.write_text(draw(results), encoding="utf-8")
        print(f"{options.picture} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
