"""The command `ross export` as a script: `python tools/convert_mcore_to_hf.py --help`."""

import sys

from ross_mcore.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
