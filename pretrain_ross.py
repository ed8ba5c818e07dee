"""Train a ROSS model: `torchrun --nproc-per-node N pretrain_ross.py --help`."""

import contextlib
import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    from ross_mcore.flags import parse

    config = parse()
    # heavy imports come after the arguments are known to be good, and after the platform is prepared
    from ross_mcore import platform

    platform.prepare()
    from ross_mcore.training.loop import train

    return train(config)


def end_at_once(number: int, _: object) -> NoReturn:
    """Ctrl-C before training takes it over (training/stop.py), as during imports, which take seconds."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, b"pretrain_ross.py: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to save, and there is nothing yet
    status = main()
    if status:  # at once: now and then, torch's threads abort a process whose interpreter ends under them
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
