"""The command `ross check` as a script: `python tools/check_checkpoint.py --help`."""

import sys

from ross_mcore.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
