"""The command `ross convert` as a script: `python tools/convert_hf_to_mcore.py --help`."""

import sys

from ross_mcore.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
