"""Train a ROSS model: `torchrun --nproc-per-node N pretrain_ross.py --help`."""

import os
import sys

from ross_mcore.flags import parse


def main() -> int:
    config = parse()
    # heavy imports come after the arguments are known to be good, and after the platform is prepared
    from ross_mcore import platform

    platform.prepare()
    from ross_mcore.training.loop import train

    return train(config)


if __name__ == "__main__":
    status = main()
    if status:  # at once: now and then, torch's threads abort a process whose interpreter ends under them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
