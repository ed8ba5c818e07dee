"""Trackers: the real packages where they are installed, and what a service that fails does to a run."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ross_mcore.checked import without_secrets
from ross_mcore.config import Config
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.errors import ConfigError, LogError
from ross_mcore.options import TRACKERS
from ross_mcore.reporting import report, trackers
from ross_mcore.reporting.board import compared_options
from ross_mcore.reporting.reporter import Reporter
from ross_mcore.reporting.services import SERVICES, Wandb, require_installed
from ross_mcore.reporting.tensorboard import TensorBoard
from ross_mcore.reporting.trackers import Feed, Trackers, read_ids
from ross_mcore.training.facts import facts


def opened(folder: Path, names: str, resume: bool = False) -> Trackers:
    config = Config.from_flat(tracker=names, save=str(folder), lr=2e-5)
    run: Any = SimpleNamespace(config=config, save_folder=folder, resume=resume, train_iters=9, rows_per_step=4)
    return Trackers(run, TrainState())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_continues_at_its_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(SERVICES[name].package) is None:
        pytest.skip(f"its package is not installed: pip install 'ross_mcore[{name}]'")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    ids = []
    for start in (1, 2):
        board = opened(tmp_path, name, resume=start > 1)
        board.scalars(start, {"loss/lm_loss": 3.0 / start, "norm/all": float("nan")})
        board.picture_named(start, "reconstruction", torch.rand(3, 8, 8))
        board.text(start, "answers", "| question | answer |\n|---|---|\n| What? | a |")
        board.finish(TrainState(), None if start > 1 else "SIGTERM")
        board.close()
        ids.append(read_ids(tmp_path / "trackers.json")[name])
    assert ids[0] == ids[1] and "warning" not in capsys.readouterr().out
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
        history = client.get_metric_history(ids[0], "loss/lm_loss")
        assert [(entry.step, entry.value) for entry in history] == [(1, 3.0), (2, 1.5)]
        assert client.get_run(ids[0]).info.status == "FINISHED"
        assert {item.path for item in client.list_artifacts(ids[0])} == {"answers", "reconstruction"}
    if name == "wandb":
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))) == 2
    if name == "trackio":
        assert list(tmp_path.glob("trackio/ross_mcore*.db"))


def test_a_missing_package_is_named_with_its_extra() -> None:
    missing = next((name for name in TRACKERS if find_spec(SERVICES[name].package) is None), None)
    if missing is None:
        pytest.skip("all trackers are installed")
    with pytest.raises(ConfigError, match=rf"pip install 'ross_mcore\[{missing}\]'"):
        require_installed((missing,))
    with pytest.raises(ConfigError, match="give some of wandb, trackio, mlflow"):
        Config.from_flat(tracker="wandb,comet")


class Broken:
    """A service whose server refuses the second figure."""

    id = "7"

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        if iteration > 1:
            raise ConnectionError("https://me:secret-word@host/ refused\nmore lines")

    def close(self, is_finished: bool) -> None:
        raise AssertionError("it is off")


def test_a_failing_service_is_one_line_and_then_off(capsys: pytest.CaptureFixture[str]) -> None:
    feed = Feed("wandb", Broken)  # type: ignore[arg-type]
    for iteration in (1, 2, 3):
        feed.put(lambda service, iteration=iteration: service.scalars(iteration, {}))
    feed.close(is_finished=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "warning: --tracker wandb failed: ConnectionError: https://***@host/ refused; training continues without it"
    )


def test_a_service_that_cannot_be_opened_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Any:
        raise OSError("no network")

    feed = Feed("mlflow", refuse)
    feed.put(lambda service: service.close(True))
    feed.close(is_finished=True)
    assert capsys.readouterr().out == (
        "warning: --tracker mlflow could not be opened: OSError: no network; training continues without it\n"
    )


def test_a_service_that_hangs_does_not_stop_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.05)
    forever = threading.Event()
    feed = Feed("trackio", lambda: SimpleNamespace(id="1"))  # type: ignore[arg-type,return-value]
    for _ in range(9):
        feed.put(lambda service: forever.wait())
    feed.close(is_finished=True)
    forever.set()
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: --tracker trackio has 3 figures waiting; ")


def test_training_begins_before_a_service_answers(capsys: pytest.CaptureFixture[str]) -> None:
    answers, ids, taken = threading.Event(), [], []

    def open_late() -> Any:
        answers.wait()
        return SimpleNamespace(id="7", close=taken.append)

    feed = Feed("mlflow", open_late, ids.append)
    feed.put(lambda service: taken.append(service.id))
    feed.wait_open(0.01)
    assert "mlflow does not answer yet; training begins" in capsys.readouterr().out and not ids
    answers.set()
    feed.close(is_finished=True)
    assert ids == ["7"] and taken == ["7", True] and not capsys.readouterr().out


def test_ids_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SERVICES, "wandb", lambda run, id: SimpleNamespace(id="7", close=lambda is_finished: None))
        board = opened(tmp_path / "missing", "wandb")
    assert "trackers.json cannot be written: " in capsys.readouterr().out
    board.close()


def test_reporters_are_closed_when_a_later_one_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class First(Reporter):
        def close(self) -> None:
            calls.append("closed")

    class Second(Reporter):
        def __init__(self, run: Run, state: TrainState) -> None:
            raise LogError("full")

    monkeypatch.setattr(report, "reporters", lambda: (First, Second))
    monkeypatch.setattr(report, "Window", lambda run: None)
    with pytest.raises(LogError):
        report.Report(SimpleNamespace(groups=SimpleNamespace(is_logging_rank=True)), TrainState())  # type: ignore[arg-type]
    assert calls == ["closed"]


def test_texts_at_wandb_are_never_markup() -> None:
    service, logged = Wandb.__new__(Wandb), []
    service._wandb, service._run = SimpleNamespace(Html=str), SimpleNamespace(log=logged.append)
    service.text(1, "answers", "| &lt;image> |\n<b> & |")
    assert logged == [{"iteration": 1, "answers": "<pre>| &lt;image&gt; |\n&lt;b&gt; &amp; |</pre>"}]


def test_what_is_kept_of_a_run_has_no_users_of_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    url, shown = "s3://me:pw@host/a", "s3://***@host/a"
    model = SimpleNamespace(denoiser=None)
    run: Any = SimpleNamespace(
        config=Config.from_flat(data_path=url), model_config=model, held_out=None, train_iters=9, rows_per_step=4
    )
    assert compared_options(run)["data_path"] == shown
    added: list[Any] = []
    monkeypatch.setattr(TensorBoard, "_add", lambda self, iteration, *found: added.extend(found))
    TensorBoard.__new__(TensorBoard).start(run, TrainState())
    assert shown in str(added) and "me:pw" not in str(added)
    part = SimpleNamespace(reader=SimpleNamespace(folder=url, fingerprint="f"))
    data: Any = SimpleNamespace(names=["a"], parts=[part], sizes=[1])
    assert facts({}, data, None)["data"][0]["path"] == shown


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdef0123456789")
    assert without_secrets("key abcdef0123456789 at s3://me:pw@host/a") == "key *** at s3://***@host/a"
