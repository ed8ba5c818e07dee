"""The command `ross plan` as a script: `python tools/plan_layout.py --help`."""

import sys

from ross_mcore.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
