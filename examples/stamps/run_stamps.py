"""The trainer on real pictures: 150 of Tux Paint's stamps and their captions, at tensor 2 x pipeline 2 on the CPU.

Fetches Debian's package tuxpaint-stamps-default, makes a tokenizer, a small VAE and vision tower from the same pictures
and a language model of random weights, then trains both stages on four ranks, stopped with SIGTERM and resumed. It ends
with a table, and exits non-zero if one of its checks fails.

It shows memorisation: the model is trained on these pictures many times and asked about the same ones; the figure is
the number of captions reproduced word for word. `make demo` asks about held-out pictures.

    python examples/stamps/run_stamps.py --out runs/stamps

About ten minutes on two idle cores. The pictures (161 MB, fetched once, no root needed) are under the GPL, version 2,
and so is everything made from them: all of it stays under --out. The next call keeps cache/ (the package) and parts/
(the initial models, made again when pictures or settings change) and makes the rest again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.errors import UserError

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

from run_demo import (  # noqa: E402
    Clock,
    check_stream,
    first_and_last_losses,
    metrics_of,
    read_train_iters,
    run,
    train_and_interrupt,
)
from stamps import QUESTION, fetch_stamps, read_captions, write_dataset  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

PICTURES, LEAST_CAPTIONS = 150, 120
PICTURES_SHOWN = 10
GRID_SCALE = 2
LONGEST_CAPTION_TOKENS = 48


def training_command(stage: str, load: Path, out: Path) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "pretrain_ross.py", "--config", HERE / f"{stage}.yaml"]
    return [*command, "--load", load, "--data-path", out / "shards" / stage, "--save", out / stage]


def psnr(pictures: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all pictures in [0, 1] together."""
    return -10 * math.log10((pictures - originals).square().mean().item())


def evaluate(out: Path) -> dict[str, Any]:
    """Counts reproduced captions and draws the grid of pictures above reconstructions."""
    import torch
    from PIL import Image

    from ross_mcore.generation import answer
    from ross_mcore.inference import as_picture, reconstruct
    from ross_mcore.reporting.pictures import picture_grid
    from ross_mcore.trained import Question, load_model, read_picture

    torch.set_num_threads(2)
    trained = load_model(out / "finetune")
    captions = read_captions(out / "data")
    preprocessing = trained.preprocessing()
    pixels = [read_picture(out / "data" / "images" / image, preprocessing) for image in captions]
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
    answers = answer(
        trained,
        [Question(turns, [picture]) for picture in pixels],
        trained.template,
        max_new_tokens=LONGEST_CAPTION_TOKENS,
        batch_size=75,
        stop=["<|im_end|>"],
    )
    rows = [
        {"image": image, "caption": caption, "given": given}
        for (image, caption), given in zip(captions.items(), answers, strict=True)
    ]
    wrong = [row for row in rows if row["given"] != row["caption"]]
    originals, samples = reconstruct(trained, pixels, batch_size=50)
    with torch.no_grad():
        decoder = trained.model.pixel_decoder
        round_trip = decoder.decode(decoder.encode(torch.stack(pixels), None))
    shown = slice(None, None, max(1, len(pixels) // PICTURES_SHOWN))
    grid = as_picture(picture_grid([originals[shown], samples[shown]]))
    size = (GRID_SCALE * grid.width, GRID_SCALE * grid.height)
    grid.resize(size, Image.Resampling.NEAREST).save(out / "reconstruction.png")
    return {
        "captions": len(rows),
        "captions_reproduced_exactly": len(rows) - len(wrong),
        "psnr_db": {"sampled": psnr(samples, originals), "vae_round_trip": psnr(round_trip, originals)},
        "examples": rows[shown][:5],
        "wrong": wrong,
    }


def checks(summary: dict[str, Any]) -> dict[str, bool]:
    """The run's checks."""
    resume = summary["resume"]
    return {
        f"at least {LEAST_CAPTIONS} of {PICTURES} captions reproduced (memorised)": (
            summary["captions"] == PICTURES and summary["captions_reproduced_exactly"] >= LEAST_CAPTIONS
        ),
        "both losses fall in both stages": all(entry["last"] < entry["first"] for entry in summary["losses"].values()),
        "stopped on the way": 0 < resume["stopped_after_iteration"] < resume["iterations"],
        "resumed: every iteration once, on the samples of the pure order": (
            resume["same_samples"] and resume["iterations_logged"] == resume["iterations"]
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stamps"), help="folder for everything [%(default)s]")
    parser.add_argument(
        "--stamps-dir", type=Path, metavar="DIR", help="unpacked stamps, instead of fetching the package"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    clock = Clock()
    try:
        with clock.measure("pictures and captions"):
            stamps_folder = options.stamps_dir or fetch_stamps(out / "cache")
            for made in ("data", "shards", "base", "pretrain", "finetune"):  # the package and the parts are kept
                shutil.rmtree(out / made, ignore_errors=True)
            write_dataset(stamps_folder, out / "data", PICTURES)
        with clock.measure("tokenizer, VAE and tower from the same pictures"):
            run([sys.executable, HERE / "make_parts.py", "--data", out / "data", "--out", out / "parts"])
        with clock.measure("shards and conversion"):
            for stage in ("pretrain", "finetune"):
                shards = [sys.executable, "tools/make_shards.py", "--data", out / "data" / f"{stage}.json"]
                run([*shards, "--image-folder", out / "data" / "images", "--out", out / "shards" / stage])
            command: list[str | Path] = [sys.executable, "tools/convert_hf_to_mcore.py", "--denoiser-width", "128"]
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
    except UserError as error:
        print(f"stamps: {error}", file=sys.stderr)
        return 1
    summary["losses"] = first_and_last_losses(out)
    summary["seconds"] = {step: round(seconds, 1) for step, seconds in clock.seconds.items()}
    summary["resume"] = {
        "stopped_after_iteration": interrupted_at,
        "iterations": train_iters,
        "iterations_logged": len(metrics_of(out / "finetune")),
        "same_samples": check_stream(out / "finetune", out / "shards" / "finetune", seed=42),
    }
    summary["checks"] = checks(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
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
    table = Table("memorisation: asked about the pictures it was trained on", "")
    table.add_row(
        "captions reproduced word for word", f"{summary['captions_reproduced_exactly']} of {summary['captions']}"
    )
    table.add_row("pictures sampled from the image states", f"PSNR {summary['psnr_db']['sampled']:.1f} dB")
    table.add_row("VAE round trip, their ceiling", f"PSNR {summary['psnr_db']['vae_round_trip']:.1f} dB")
    resume = summary["resume"]
    stopped = f"after iteration {resume['stopped_after_iteration']} of {resume['iterations']}"
    table.add_row("finetune stopped with SIGTERM and resumed", stopped)
    console.print(table)
    for row in [*summary["examples"], *summary["wrong"][:5]]:
        verdict = "" if row["given"] == row["caption"] else f"   WRONG, it is: {row['caption']}"
        console.print(f"  {row['image']}: {row['given']}{verdict}", highlight=False, markup=False)
    table = Table("check", "")
    for name, passed in summary["checks"].items():
        table.add_row(name, "[green]ok[/]" if passed else "[red]FAILED[/]")
    console.print(table)
    table = Table("where the time went", "seconds")
    for step, seconds in summary["seconds"].items():
        table.add_row(step, f"{seconds:.0f}")
    table.add_row("total", f"{sum(summary['seconds'].values()):.0f}")
    console.print(table)
    console.print("Made before the training: VAE and vision tower from the same pictures, without their captions; the")
    console.print(
        "language model starts from random weights. Everything made from the GPL-2 pictures stays in this folder."
    )
    console.print(
        f"Open: {out}/reconstruction.png (pictures over what the image states reconstruct), {out}/summary.json",
        markup=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
