"""The command `ross eval` as a script: `python tools/evaluate.py --help`."""

import sys

from ross_mcore.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
