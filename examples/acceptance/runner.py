"""Runs the parts one after the other; each command has its own process group, time limit and log."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from examples.acceptance import judge
from examples.acceptance.parts import COMMON, MINUTES, Machine, Part, Training, with_references
from examples.acceptance.report import FAIL, PASS, SKIP, TAIL, Outcome, Result

ROOT = Path(__file__).parents[2]
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
FP32_EXACTLY = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
"""fp32 comparisons compute in fp32 on a GPU too, in Transformer Engine as well; see platform.compute_fp32_exactly."""
FOLDERS = ("logs", "data", "shards", "models", "checkpoints", "runs")
GRACE_SECONDS = 30
"""Time limit for killed processes to end: one inside a driver ends late, and its GPU is free only then."""


class CommandError(RuntimeError):
    """A command that failed or took too long; `last_lines` is the end of its output."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.last_lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])


class CutError(RuntimeError):
    """What a part has no time for."""


class Runner:
    """`out`: the folder of all output, in FOLDERS; call `clear` first.

    named: parts that run although they have no share of the time. Shares are kept on GPUs alone.
    """

    def __init__(
        self, out: Path, machine: Machine, environment: Mapping[str, str], named: Collection[str] = ()
    ) -> None:
        self._out, self.machine, self._environment, self._named = out, machine, environment, named
        self._trained: dict[str, Result] = {}
        self._notes: list[str] = []
        self._deadline = math.inf

    def clear(self) -> None:
        """Removes the output of an earlier run from `out`."""
        for name in FOLDERS:
            shutil.rmtree(self._out / name, ignore_errors=True)
        (self._out / "logs").mkdir(parents=True)

    def run(self, part: Part) -> Outcome:
        """The outcome of the part; raises only KeyboardInterrupt."""
        began = time.monotonic()
        if reason := self.machine.refusal(part.needs, part.ranks):
            return Outcome(part, SKIP, reason)
        minutes = part.minutes[self.machine.ranks > 1]
        if not minutes and part.name not in self._named:
            whole = MINUTES[self.machine.ranks > 1]
            return Outcome(part, SKIP, f"has no share of the {whole} minutes; --parts {part.name} runs it")
        self._deadline = began + 60 * minutes if self.machine.gpu and minutes else math.inf
        self._notes = []
        results: list[Result] = []
        status, why, last_lines = PASS, "", ""
        try:
            for number, command in enumerate(part.commands, start=1):
                self.command(command, f"{part.name}_{number}" if len(part.commands) > 1 else part.name, part)
            for training in with_references(part):
                try:
                    results.append(self._judged(training, part))
                except CutError as cut:
                    results.append(Result(training.name, SKIP, str(cut)))
                except Exception as error:  # any error: the next training may work
                    last_lines = getattr(error, "last_lines", last_lines)
                    results.append(Result(training.name, FAIL, _named(error)))
        except CutError as cut:
            status, why = SKIP, str(cut)
        except Exception as error:
            status, why, last_lines = FAIL, _named(error), getattr(error, "last_lines", "")
        compared = [result for result in results if result.name != part.against]
        skipped = [result for result in compared if result.status == SKIP]
        if failed := [result.name for result in results if result.status == FAIL]:
            status, why = FAIL, "; ".join(failed)
        elif skipped and len(skipped) == len(compared):
            status, why = SKIP, skipped[0].why
        elif skipped:
            why = f"{len(skipped)} of {len(compared)} were skipped: {skipped[0].why}"
        return Outcome(part, status, why, results, last_lines, time.monotonic() - began, self._notes)

    def command(self, text: str, name: str, part: Part, environment: Mapping[str, str] = FP32_EXACTLY) -> str:
        """Runs a command of the table and returns its output. Raises CommandError, CutError."""
        program, *words = shlex.split(text.format(out=shlex.quote(str(self._out)), ranks=self.machine.ranks))
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise CutError(f"cut: the part's {part.minutes[self.machine.ranks > 1]:g} minutes were over before it")
        log = self._out / "logs" / f"{_file_name(name)}.log"
        with log.open("w", encoding="utf-8") as stream:
            stream.write(f"$ {text}\n")
            stream.flush()
            process = subprocess.Popen(
                [*PROGRAMS[program], *words],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment, **environment},
                start_new_session=True,
            )
            try:
                status = process.wait(min(left, part.limit_seconds))
            except subprocess.TimeoutExpired:
                if left < part.limit_seconds:
                    raise CutError(f"cut after {left:.0f} s, the rest of the part's share of the time") from None
                raise CommandError(f"{log.name}: took more than {part.limit_seconds} s", log) from None
            finally:
                _end(process)
        if status:
            raise CommandError(f"{log.name}: ended with status {status}", log)
        output = log.read_text(encoding="utf-8", errors="replace")
        self._notes += judge.notes(output)
        return output

    def train(self, training: Training, part: Part) -> Result:
        """Runs the training, once. Raises CommandError."""
        if training.name not in self._trained:
            self._trained[training.name] = self._train(training, part)
        return self._trained[training.name]

    def _train(self, training: Training, part: Part) -> Result:
        from ross_mcore.logs import METRICS_FILE, read_entries

        folder = self._out / "runs" / _file_name(training.name)
        shutil.rmtree(folder, ignore_errors=True)
        precision = {} if "--bf16" in f"{training.flags} {COMMON[training.model]}" else FP32_EXACTLY
        log = ""
        for number, life in enumerate(training.lives, start=1):
            name = training.name if len(training.lives) == 1 else f"{training.name} {number}"
            log = self.command(
                f"torchrun --nproc-per-node {life.ranks} pretrain_ross.py {COMMON[training.model]} "
                f"--load {{out}}/checkpoints/{training.model} --data-path {{out}}/shards "
                f"--save {shlex.quote(str(folder))} --train-iters {training.iterations} {training.flags} {life.flags}",
                name,
                part,
                precision,
            )
        steps = list(read_entries(folder / METRICS_FILE))
        for checkpoint in folder.glob("iter_*"):  # not read again, and large ones fill the disk
            shutil.rmtree(checkpoint)
        problem = judge.problem(steps, training.iterations, falls=training.falls)
        status, planned = FAIL if problem else PASS, self._planned(training, part) if training.planned else None
        return Result(training.name, status, problem or "", steps, None, judge.speed(log), planned, judge.stall(log))

    def _planned(self, training: Training, part: Part) -> float | None:
        """GiB of the fullest rank, by tools/plan_layout.py. Raises CommandError."""
        life = training.lives[-1]
        output = self.command(
            f"python tools/plan_layout.py --world-size {life.ranks} {COMMON[training.model]} --train-iters 1 "
            f"--load {{out}}/checkpoints/{training.model} {training.flags} {life.flags}",
            f"{training.name} planned",
            part,
        )
        return judge.planned(output)

    def _judged(self, training: Training, part: Part) -> Result:
        """Runs the training and compares it with the part's reference. Raises CommandError."""
        if reason := self.machine.refusal(training.needs, training.ranks):
            return Result(training.name, SKIP, reason)
        own = self.train(training, part)
        if part.against is None or part.tolerance is None or training.name == part.against or own.status == FAIL:
            return own
        reference = self._trained.get(part.against)
        if reference is None:
            return Result(own.name, FAIL, f"{part.against} failed, and is its reference", own.steps)
        far = judge.difference(own.steps, reference.steps)
        tolerance = part.tolerance.gpu if self.machine.gpu else part.tolerance.cpu
        why = f"tolerance {tolerance:.0e}" + ("" if far <= tolerance else ": too far")
        status = PASS if far <= tolerance else FAIL
        return replace(own, status=status, why=why, difference=far)


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills all processes of a command: torchrun's ranks have their own sessions, so each is killed."""
    import psutil

    if process.poll() is None:
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for each in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(others, timeout=GRACE_SECONDS)


def shown(words: Sequence[str]) -> str:
    """The command as typed."""
    return shlex.join(["examples/gpu_acceptance.sh", *words])
