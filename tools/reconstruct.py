"""The command `ross reconstruct` as a script: `python tools/reconstruct.py --help`."""

import sys

from ross_mcore.commands.reconstruct import main

if __name__ == "__main__":
    sys.exit(main())
