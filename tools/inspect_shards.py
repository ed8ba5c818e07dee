"""The command `ross inspect-shards` as a script: `python tools/inspect_shards.py --help`."""

import sys

from ross_mcore.commands.inspect_shards import main

if __name__ == "__main__":
    sys.exit(main())
