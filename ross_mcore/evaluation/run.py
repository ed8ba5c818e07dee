"""Answers the questions of benchmarks with a trained model: in one process, or a share of the batches on every rank.

Each rank has the whole model. Ranks communicate before and after a benchmark and never while they answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from PIL import Image

from ross_mcore import checked
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.manifest import MARKER
from ross_mcore.data.image import decode_image
from ross_mcore.errors import ConfigError, ConversationError, ImageError, RecordsError, SampleError
from ross_mcore.evaluation.items import Item, Judged, Prediction, first_groups
from ross_mcore.evaluation.predictions import Settings, add_predictions, open_folder, read_predictions, write_judged
from ross_mcore.evaluation.quality import psnr, ssim
from ross_mcore.evaluation.questions import Asking
from ross_mcore.evaluation.table import BENCHMARKS, Benchmark
from ross_mcore.generation import Sampling, generate_each
from ross_mcore.inference import reconstruct
from ross_mcore.parallel.collectives import all_or_none, from_first_rank
from ross_mcore.shards.pictures import PictureFolder
from ross_mcore.trained import Question, TrainedModel

PICTURES_AT_ONCE = 8
"""Pictures that are reconstructed together. The noise of a picture depends on its place among them, so their number is
the same in every run."""


@dataclass(frozen=True)
class Task:
    """A benchmark to run, as the command line or an entry of --suite gives it."""

    benchmark: str
    data: str
    image_folder: str | None = None
    """Folder of the pictures that questions name; by default --data, or the folder it is in."""
    suffix: str | None = None
    """Last line of every question; None: the benchmark's."""
    max_new_tokens: int | None = None
    """Longest answer; None: the benchmark's."""
    by: str = "category"
    """Column or key by which scores are given too."""
    limit: int | None = None
    """Number of questions, from the first, and the rest of the last one's group; None: all."""
    follow_links: bool = False
    """Allow links that lead out of the folder of pictures."""
    steps: int = 50
    """Sampling steps of a reconstruction."""
    seed: int = 0
    """Seed of the reconstructions' noise."""

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise ConfigError(f"--benchmark {checked.shown(self.benchmark)} is unknown; take one of {known}")
        for name, value, most in (
            ("max_new_tokens", self.max_new_tokens, checked.MOST_COUNT),
            ("limit", self.limit, checked.MOST_COUNT),
            ("steps", self.steps, 1000),
        ):
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not between 1 and {most}")

    @property
    def row(self) -> Benchmark:
        return BENCHMARKS[self.benchmark]

    @property
    def pictures(self) -> PictureFolder:
        data = Path(self.data)
        folder = Path(self.image_folder) if self.image_folder else data if data.is_dir() else data.parent
        return PictureFolder(folder, self.follow_links)

    @property
    def answer_tokens(self) -> int:
        return self.max_new_tokens or self.row.max_new_tokens

    def items(self) -> list[Item]:
        """Reads the questions. Raises RecordsError."""
        suffix = self.row.suffix if self.suffix is None else self.suffix
        chinese = self.row.chinese_suffix if self.suffix is None else ""
        items = self.row.read_items(Path(self.data), Asking(suffix, chinese, self.by))
        if not items:
            raise RecordsError(f"{self.data} has no questions")
        return items if self.limit is None else first_groups(items, self.limit)


def settings_of(task: Task, items: Sequence[Item], trained: TrainedModel, template: str | None, dtype: str) -> Settings:
    """What predictions depend on, for the comparison at resume. Pictures count by their names, not their contents."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.id, item.turns, item.pictures, item.answers, item.options)).encode())
    common = {
        "benchmark": task.benchmark,
        "data": f"{len(items)} questions, {digest.hexdigest()[:16]}",
        "model": identity(trained.checkpoint),
        "dtype": dtype,
    }
    if task.row.makes == "reconstructions":
        return {**common, "steps": str(task.steps), "seed": str(task.seed)}
    return {**common, "template": template or trained.template, "max_new_tokens": str(task.answer_tokens)}


def identity(checkpoint: Checkpoint) -> str:
    """A checkpoint by its iteration and the checksums of its files; the same after it is moved. Raises OSError."""
    return f"{checkpoint.path.name} {hashlib.sha256((checkpoint.path / MARKER).read_bytes()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Evaluation:
    """A model, and how it is run."""

    trained: TrainedModel
    dtype: str = "float32"
    template: str | None = None
    batch_size: int = 32

    def run(self, task: Task, folder: Path, progress: Callable[[int, int], None]) -> list[Judged]:
        """Answers what `folder` does not have yet; returns all items judged, on other ranks than the first none.

        Collective. `progress(done, total)` is called with this rank's counts. Raises UserError, OSError.
        """
        items = all_or_none(task.items)
        settings = settings_of(task, items, self.trained, self.template, self.dtype)
        have = set(from_first_rank(lambda: list(open_folder(folder, settings))))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        batches = list(self._batches(task, items, have))[rank::ranks]
        done, total = 0, sum(len(wanted) for _, wanted in batches)
        progress(0, total)
        for batch, wanted in batches:
            made = self._predict(task, batch)
            add_predictions(folder, rank, [each for each in made if each["id"] in wanted])
            done += len(wanted)
            progress(done, total)
        dist.barrier()
        return all_or_none(lambda: _finish(task, items, folder) if rank == 0 else [])

    def _batches(self, task: Task, items: Sequence[Item], have: set[str]) -> Iterator[tuple[Sequence[Item], set[str]]]:
        """(items that are computed together, the ids of those that are wanted)."""
        if task.row.makes == "answers":
            items = [item for item in items if item.id not in have]
        size = self.batch_size if task.row.makes == "answers" else PICTURES_AT_ONCE
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            if wanted := {item.id for item in batch} - have:
                yield batch, wanted

    def _predict(self, task: Task, items: Sequence[Item]) -> list[Prediction]:
        good: list[tuple[Item, list[Image.Image]]] = []
        made: list[Prediction] = []
        folder = task.pictures
        for item in items:
            try:
                good.append((item, [self._picture(folder, name) for name in item.pictures]))
            except (SampleError, ImageError) as error:
                made.append({"id": item.id, "bad": str(error)})
        if good and task.row.makes == "reconstructions":
            return made + self._reconstruct(task, good)
        return made + (self._answer(task, good) if good else [])

    def _picture(self, folder: PictureFolder, name: object) -> Image.Image:
        return decode_image(folder.read(name), self.trained.spec.truncated_images).picture

    def _answer(self, task: Task, asked: Sequence[tuple[Item, list[Image.Image]]]) -> list[Prediction]:
        questions = [
            Question([{"from": role, "value": text} for role, text in item.turns], pictures) for item, pictures in asked
        ]
        sampling = Sampling(max_new_tokens=task.answer_tokens)
        found = generate_each(self.trained, questions, sampling, template=self.template, batch_size=self.batch_size)
        return [
            {"id": item.id, "bad": str(answer)}  # such as a question that is too long for the model
            if isinstance(answer, ConversationError)
            else {"id": item.id, "text": answer.text, "finish_reason": answer.finish_reason}
            for (item, _), answer in zip(asked, found, strict=True)
        ]

    def _reconstruct(self, task: Task, asked: Sequence[tuple[Item, list[Image.Image]]]) -> list[Prediction]:
        pictures = [picture for _, some in asked for picture in some]
        pair = reconstruct(self.trained, pictures, steps=task.steps, seed=task.seed, batch_size=PICTURES_AT_ONCE)
        return [
            {"id": item.id, "psnr": noise, "ssim": similarity}
            for (item, _), noise, similarity in zip(asked, psnr(*pair).tolist(), ssim(*pair).tolist(), strict=True)
        ]


def _finish(task: Task, items: Sequence[Item], folder: Path) -> list[Judged]:
    """Judges the predictions of all ranks and writes them in order."""
    predictions = read_predictions(folder)
    if missing := [item.id for item in items if item.id not in predictions]:
        raise ConfigError(
            f"{folder} lacks predictions of other processes, such as {checked.shown(missing[0])}: give an --out that "
            "all machines share, or run the command again"
        )
    judged = task.row.judge(items, predictions)
    write_judged(folder, judged)
    return judged
