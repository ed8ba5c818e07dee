"""The command `ross chat` as a script: `python tools/chat.py --help`."""

import sys

from ross_mcore.commands.chat import main

if __name__ == "__main__":
    sys.exit(main())
