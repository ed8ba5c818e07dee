"""The trainer on real pictures: 150 of Tux Paint's stamps and their captions, at tensor 2 x pipeline 2 on the CPU.

Fetches Debian's package tuxpaint-stamps-default (GPL-2; nothing of it is kept in this repository), makes a tokenizer, a
small VAE and vision tower from the same pictures and a language model of random weights, then trains both stages on
four ranks, stopped on the way and resumed. What it shows is memorisation: how many captions come back word for word.

    python examples/stamps/run_stamps.py --out runs/stamps
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

from run_demo import (  # noqa: E402
    Clock,
    DemoError,
    check_stream,
    first_and_last_losses,
    read_train_iters,
    run,
    train_and_interrupt,
)
from stamps import StampsError, fetch_stamps, read_captions, write_dataset  # noqa: E402

PICTURES, LEAST_CAPTIONS = 150, 120
PICTURES_SHOWN = 10
LONGEST_CAPTION_TOKENS = 48


def training_command(stage: str, load: Path, out: Path) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "pretrain_ross.py", "--config", HERE / f"{stage}.yaml"]
    return [*command, "--load", load, "--data-path", out / "shards" / stage, "--save", out / stage]


def evaluate(out: Path) -> dict[str, Any]:
    """How many captions are reproduced, and the grid of pictures over reconstructions."""
    from ross_mcore import platform

    platform.prepare()
    import torch

    from ross_mcore.inference import Question, answer, as_picture, load_model, read_picture, reconstruct
    from ross_mcore.training.metrics import picture_grid

    torch.set_num_threads(2)
    trained = load_model(out / "finetune")
    records = json.loads((out / "data" / "finetune.json").read_text(encoding="utf-8"))
    captions = read_captions(out / "data")
    preprocessing = trained.preprocessing()
    pixels = [read_picture(out / "data" / "images" / record["image"], preprocessing) for record in records]
    questions = [Question(r["conversations"][:1], picture) for r, picture in zip(records, pixels, strict=True)]
    answers = answer(
        trained, questions, trained.template, max_new_tokens=LONGEST_CAPTION_TOKENS, batch_size=75, stop=["<|im_end|>"]
    )
    right = [given == captions[r["image"]] for given, r in zip(answers, records, strict=True)]
    originals, samples = reconstruct(trained, pixels[:: max(1, len(pixels) // PICTURES_SHOWN)])
    as_picture(picture_grid([originals, samples])).save(out / "reconstruction.png")
    return {
        "captions": len(right),
        "captions_reproduced_exactly": sum(right),
        "examples": [{"caption": captions[r["image"]], "given": a} for r, a in list(zip(records, answers))[:5]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stamps"), help="folder for everything [%(default)s]")
    parser.add_argument(
        "--stamps-dir", type=Path, metavar="DIR", help="unpacked stamps, instead of fetching the package"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    for made in ("data", "shards", "base", "pretrain", "finetune"):  # the package and the parts are kept
        shutil.rmtree(out / made, ignore_errors=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    clock = Clock()
    try:
        with clock.measure("pictures and captions"):
            chosen = write_dataset(options.stamps_dir or fetch_stamps(out / "cache"), out / "data", PICTURES)
        with clock.measure("tokenizer, VAE and tower from the same pictures"):
            run([sys.executable, HERE / "make_parts.py", "--data", out / "data", "--out", out / "parts"])
        with clock.measure("shards and conversion"):
            for stage in ("pretrain", "finetune"):
                shards = [sys.executable, "tools/make_shards.py", "--data", out / "data" / f"{stage}.json"]
                run([*shards, "--image-folder", out / "data" / "images", "--out", out / "shards" / stage])
            command = [sys.executable, "tools/convert_hf_to_mcore.py", "--denoiser-width", "128"]
            for part in ("language-model", "vision-model", "pixel-decoder", "tokenizer"):
                command += [f"--{part}", out / "parts" / part.replace("-", "_")]
            run([*command, "--save", out / "base"])
        with clock.measure("pretrain, 4 ranks"):
            run(training_command("pretrain", out / "base", out))
        with clock.measure("finetune, 4 ranks, stopped in the middle and resumed"):
            command = training_command("finetune", out / "pretrain", out)
            train_iters = read_train_iters(HERE / "finetune.yaml")
            interrupted_at = train_and_interrupt(command, out / "finetune", train_iters // 2)
            run(command)
        with clock.measure("captions and reconstruction, 1 process"):
            summary = evaluate(out)
    except (DemoError, StampsError) as error:
        print(f"stamps: {error}", file=sys.stderr)
        return 1
    summary["losses"] = first_and_last_losses(out)
    summary["seconds"] = {step: round(seconds, 1) for step, seconds in clock.seconds.items()}
    summary["checks"] = {
        f"at least {LEAST_CAPTIONS} of {PICTURES} captions reproduced (memorised)": (
            len(chosen) == PICTURES and summary["captions_reproduced_exactly"] >= LEAST_CAPTIONS
        ),
        f"stopped after iteration {interrupted_at} of {train_iters} and resumed on the same samples": (
            0 < interrupted_at < train_iters and check_stream(out / "finetune", out / "shards" / "finetune", seed=42)
        ),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    show(summary, out)
    return 0 if all(summary["checks"].values()) else 1


def show(summary: dict[str, Any], out: Path) -> None:
    """The table at the end."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width))
    table = Table("losses", "first step", "end of stage", title="stamps: real pictures at tensor 2 x pipeline 2")
    for name, entry in summary["losses"].items():
        table.add_row(name, f"{entry['first']:.3f}", f"{entry['last']:.3f}")
    console.print(table)
    for example in summary["examples"]:
        console.print(f"  {example['caption']} -> [bold]{example['given']}[/]")
    exact, count = summary["captions_reproduced_exactly"], summary["captions"]
    console.print(
        f"captions reproduced word for word: {exact} of {count} (memorisation: these pictures were trained on)"
    )
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
        f"Open: {out}/reconstruction.png (pictures over what the image states reconstruct), {out}/summary.json"
    )


if __name__ == "__main__":
    raise SystemExit(main())
