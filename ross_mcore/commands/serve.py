"""Serves trained models over HTTP: OpenAI's chat completions, and a page to talk to them and see what they reconstruct.

python tools/serve.py --load runs/finetune

The page is at the address that is printed; the interface is under /v1. Several checkpoints stand side by side. See
docs/serving.md for requests, limits and keys.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ross_mcore.commands import build_parser, ending_cleanly, interrupted, names_of, refuse
from ross_mcore.errors import ConfigError, UserError

if TYPE_CHECKING:
    from ross_mcore.serving.server import Server

SCRIPT = "serve.py"
KEY_VARIABLE = "ROSS_API_KEY"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, nargs="+", metavar="RUN", help="folders of runs or checkpoints")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every network [%(default)s]")
    add("--port", type=int, default=8000, metavar="N", help="port to listen at; 0 is any free one [%(default)s]")
    add("--allow-host", nargs="+", default=[], metavar="NAME", help="other names by which browsers reach this server")
    add("--api-key", metavar="KEY", help=f"key that requests must have [{KEY_VARIABLE} of the environment, or none]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="computed in [%(default)s]")
    add("--template", metavar="NAME", help="conversation template [that of each checkpoint's training]")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="most tokens of an answer [%(default)s]")
    add("--max-images", type=int, default=8, metavar="N", help="most pictures of a request [%(default)s]")
    add("--max-request-mib", type=int, default=32, metavar="N", help="largest request [%(default)s]")
    add("--max-waiting", type=int, default=8, metavar="N", help="requests that wait for each model [%(default)s]")
    options = parser.parse_args(arguments)
    options.api_key = options.api_key or os.environ.get(KEY_VARIABLE)
    if not 0 <= options.port <= 65535:
        parser.error("--port must be between 0 and 65535")
    for name in ("max_new_tokens", "max_images", "max_request_mib", "max_waiting"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    folders = [folder.resolve() for folder in options.load]
    if len(set(folders)) < len(folders):
        parser.error("--load names a folder twice; give each checkpoint once")
    return options


def require_libraries() -> None:
    """Raises ConfigError with the remedy unless the libraries of the server are installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed; pip install 'ross_mcore[serve]'")


def prepare(options: argparse.Namespace, bound: socket.socket) -> Server:
    """Loads the models and makes the server; it has begun no work. Raises UserError, OSError."""
    from rich.progress import Progress

    from ross_mcore import platform
    from ross_mcore.serving.app import Service, create_app
    from ross_mcore.serving.gate import Gate
    from ross_mcore.serving.model import ServedModel
    from ross_mcore.serving.protocol import Limits
    from ross_mcore.serving.server import Server
    from ross_mcore.serving.worker import Worker
    from ross_mcore.trained import load_model

    models = {}
    with Progress(transient=True) as progress:
        for name, folder in progress.track(list(zip(names_of(options.load), options.load)), description="loading"):
            models[name] = ServedModel(name, load_model(folder, options.dtype), options.template)
    limits = Limits(
        body_bytes=options.max_request_mib << 20,
        pictures=options.max_images,
        new_tokens=options.max_new_tokens,
        waiting=options.max_waiting,
    )
    device = platform.device()
    worker = Worker(list(models), limits.waiting, lambda: platform.use_device(device))
    app = create_app(Service(models, worker, limits))
    hosts = [options.host, socket.gethostname(), socket.getfqdn(), *options.allow_host]
    return Server(Gate(app, hosts, options.api_key), worker)


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    try:
        require_libraries()
        from ross_mcore.serving.server import bind

        with ending_cleanly(), bind(options.host, options.port) as bound:
            server = prepare(options, bound)
            print(f"{', '.join(names_of(options.load))} at {address(bound)} (Ctrl-C ends)", flush=True)
            if not is_loopback(bound) and options.api_key is None:
                print("warning: reachable from other machines without a key; --api-key asks for one", file=sys.stderr)
            server.run(sockets=[bound])
    except (UserError, OSError) as error:
        return refuse(prog, error)
    except KeyboardInterrupt:
        return interrupted(prog, "it had not begun to serve")
    return 0


def address(bound: socket.socket) -> str:
    """The URL of the page."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback
