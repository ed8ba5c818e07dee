"""The command `ross serve` as a script: `python tools/serve.py --help`."""

import sys

from ross_mcore.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
