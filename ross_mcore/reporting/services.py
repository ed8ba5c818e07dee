"""The services that take a run's figures (--tracker), behind one interface. Their packages are optional.

What they keep is in the run's folder unless their own variables name a server: WANDB_MODE=online, MLFLOW_TRACKING_URI,
TRACKIO_SERVER_URL. Nothing is sent anywhere by default.
"""

from __future__ import annotations

import html
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from numpy import uint8
from numpy.typing import NDArray

from ross_mcore.errors import ConfigError


@dataclass(frozen=True)
class TrackedRun:
    """What a service gets of a run. folder: for what it keeps; options: by flag."""

    project: str
    name: str
    folder: Path
    options: Mapping[str, str | float | bool]


class Service(ABC):
    """A run at a service; `id` finds it again when the run is resumed. Methods raise what its package raises."""

    package: ClassVar[str]
    """The module to import."""

    id: str

    @abstractmethod
    def __init__(self, run: TrackedRun, id: str | None) -> None:
        """Begins a run, or continues the one with that id."""

    @abstractmethod
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def picture(self, iteration: int, name: str, pixels: NDArray[uint8]) -> None:
        """pixels [H, W, 3]."""

    @abstractmethod
    def text(self, iteration: int, name: str, markdown: str) -> None: ...

    @abstractmethod
    def close(self, is_finished: bool) -> None:
        """Sends what waits. is_finished: whether the run is, or will be resumed."""


class Wandb(Service):
    """Weights & Biases. Offline unless WANDB_MODE says otherwise."""

    package = "wandb"

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        import wandb

        self._wandb, self.id = wandb, id or uuid.uuid4().hex
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=self.id,
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or "offline",
            dir=str(run.folder),
            config=dict(run.options),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        # its own steps only grow, and a resumed run repeats iterations
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def picture(self, iteration: int, name: str, pixels: NDArray[uint8]) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Image(pixels)})

    def text(self, iteration: int, name: str, markdown: str) -> None:
        shown = html.escape(html.unescape(markdown))  # Markdown has some characters escaped
        self._run.log({"iteration": iteration, name: self._wandb.Html(f"<pre>{shown}</pre>")})

    def close(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


class Trackio(Service):
    """Trackio, whose runs are found again by their name."""

    package = "trackio"

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))
        import trackio

        self._trackio, self.id = trackio, id or run.name
        self._run = trackio.init(
            project=run.project,
            name=self.id,
            config=dict(run.options),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def picture(self, iteration: int, name: str, pixels: NDArray[uint8]) -> None:
        self._run.log({name: self._trackio.Image(pixels)}, step=iteration)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._run.log({name: self._trackio.Markdown(markdown)}, step=iteration)

    def close(self, is_finished: bool) -> None:
        self._run.finish()


class Mlflow(Service):
    """MLflow, by default with a database in the run's folder."""

    package = "mlflow"

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        folder, uri = (run.folder / "mlflow").resolve(), os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            folder.mkdir(exist_ok=True)
        self._client, self._metric = MlflowClient(tracking_uri=uri or f"sqlite:///{folder}/mlflow.db"), Metric
        if id is None:
            experiment = self._client.get_experiment_by_name(run.project)
            location = None if uri else str(folder / "artifacts")
            number = experiment.experiment_id if experiment else self._client.create_experiment(run.project, location)
            self.id = self._client.create_run(number, run_name=run.name).info.run_id
        else:
            self.id = id
            self._client.update_run(id, status="RUNNING")
        for name, value in run.options.items():
            self._client.set_tag(self.id, f"option.{name}", str(value))  # parameters cannot change at a resume

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        names = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in values.items()}
        metrics = [self._metric(name, value, now, iteration) for name, value in names.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def picture(self, iteration: int, name: str, pixels: NDArray[uint8]) -> None:
        self._client.log_image(self.id, pixels, artifact_file=f"{name}/{iteration:08d}.png")

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._client.log_text(self.id, markdown, f"{name}/{iteration:08d}.md")

    def close(self, is_finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if is_finished else "KILLED")


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}
"""Values of --tracker, which are the names of the extras too."""


def require_installed(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a tracker whose package is missing."""
    for name in names:
        if find_spec(SERVICES[name].package) is None:
            raise ConfigError(
                f"--tracker {name}: the package {SERVICES[name].package} is not installed; install it with "
                f"`pip install 'ross_mcore[{name}]'`, or remove the flag"
            )
