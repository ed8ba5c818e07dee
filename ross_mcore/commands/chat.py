"""Talks with a trained model: in the terminal, one question, or the questions of a file.

python tools/chat.py --load runs/finetune --image cat.jpg
python tools/chat.py --load runs/finetune --image cat.jpg --question "What is it?"
python tools/chat.py --load runs/finetune --input questions.jsonl --image-folder pictures --output answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ross_mcore.commands import TEMPLATE_HELP, build_parser, ending_cleanly, interrupted, refuse

if TYPE_CHECKING:
    from ross_mcore.generation import Sampling
    from ross_mcore.trained import TrainedModel

SCRIPT = "chat.py"

EPILOG = """In the terminal: /image FILE shows a picture with the next question, /reset begins a new conversation, /exit
or Ctrl-D ends, Ctrl-C stops an answer.

A file of questions is a JSON list or JSON lines: {"question_id": 1, "image": "cat.jpg", "text": "What is it?"}, or
conversations as in training, whose last turn is asked. Answers are appended line by line; after an interruption the
same command asks what has no answer yet, and again what could not be asked."""


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="folder of a run or of a checkpoint")
    add("--dtype", choices=("float32", "bfloat16"), help="computes in this type [bfloat16 on a GPU, else float32]")
    add("--template", help=f"{TEMPLATE_HELP} [as in the run's training]")
    add("--system", metavar="TEXT", help="system message in place of the template's own")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help="pictures of the first question")
    add("--question", metavar="TEXT", help="prints the answer to one question and ends")
    sampling = parser.add_argument_group("answers").add_argument
    sampling("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer [%(default)s]")
    sampling("--temperature", type=float, default=0.0, metavar="X", help="0 takes the most likely token [%(default)s]")
    sampling("--top-p", type=float, default=1.0, metavar="P", help="draws from the most likely tokens [%(default)s]")
    sampling("--seed", type=int, default=0, help="seed of the draws [%(default)s]")
    sampling("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    file = parser.add_argument_group("the questions of a file").add_argument
    file("--input", type=Path, metavar="FILE", help="JSON or JSON lines, see below")
    file("--output", type=Path, metavar="FILE", help="JSON lines to append the answers to")
    file("--image-folder", type=Path, metavar="DIR", help="folder of the pictures [that of --input]")
    file("--batch-size", type=int, default=32, metavar="N", help="questions that are answered together [%(default)s]")
    options = parser.parse_args(arguments)
    if (options.input is None) != (options.output is None):
        parser.error("--input and --output need each other")
    if options.input is not None and (options.question is not None or options.image):
        parser.error("--question and --image belong to a conversation; the file of --input has its own")
    if options.image_folder is not None and options.input is None:
        parser.error("--image-folder belongs to --input")
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from ross_mcore import platform
    from ross_mcore.errors import UserError
    from ross_mcore.generation import Sampling
    from ross_mcore.trained import load_model

    try:
        with ending_cleanly():
            if options.input is not None:
                require_another_file(options.input, options.output)
            sampling = Sampling(
                options.max_new_tokens, options.temperature, options.top_p, options.seed, tuple(options.stop)
            )
            trained = load_model(options.load, options.dtype or ("bfloat16" if platform.has_gpu() else "float32"))
            if options.input is not None:
                return answer_file(trained, sampling, options, prog)
            return talk(trained, sampling, options)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    except KeyboardInterrupt:
        if options.output is None:
            return interrupted(prog, "the conversation is over")
        return interrupted(prog, f"answers so far are in {options.output}; run the same command to continue")


def require_another_file(questions: Path, answers: Path) -> None:
    """Raises ConfigError, OSError."""
    from ross_mcore.errors import ConfigError

    if questions.exists() and answers.exists() and questions.samefile(answers):
        raise ConfigError(f"--output {answers} is the file of --input; give another file")


def talk(trained: TrainedModel, sampling: Sampling, options: argparse.Namespace) -> int:
    """One question, or a conversation. Raises UserError, OSError, KeyboardInterrupt."""
    from ross_mcore.chat.session import HELP, Conversation, say
    from ross_mcore.chat.session import talk as converse

    conversation = Conversation(trained, sampling, options.template, options.system)
    for path in options.image:
        conversation.show(path)
    if options.question is not None:
        conversation.ask(options.question, say)
        say("\n")
        return 0
    if sys.stdin.isatty():
        template = options.template or trained.template
        say(f"{options.load}, iteration {trained.checkpoint.iteration}, template {template}\n{HELP}\n")
    converse(conversation)
    return 0


def answer_file(trained: TrainedModel, sampling: Sampling, options: argparse.Namespace, prog: str) -> int:
    """Raises UserError, OSError, KeyboardInterrupt."""
    from rich.console import Console
    from rich.progress import Progress

    from ross_mcore.chat.batch import Answering
    from ross_mcore.shards.files import read_records
    from ross_mcore.shards.pictures import PictureFolder

    count, records = read_records(options.input)
    name = f"{options.load} iteration {trained.checkpoint.iteration}"
    folder = PictureFolder(options.image_folder or options.input.parent)
    answering = Answering(trained, name, sampling, options.template, folder, options.batch_size, options.system)
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("questions", total=count)
        answers, errors = answering.answer(records, options.output, lambda number: bars.advance(bar, number))
    print(f"{options.output}: {answers} answers" + (f", {errors} questions could not be asked" if errors else ""))
    return 1 if errors else 0
