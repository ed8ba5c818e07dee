"""The command `ross report` as a script: `python tools/report.py --help`."""

import sys

from ross_mcore.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
