"""The command `ross precompute` as a script: `python tools/precompute_latents.py --help`."""

import sys

from ross_mcore.commands.precompute import main

if __name__ == "__main__":
    sys.exit(main())
