"""The command `ross index-shards` as a script: `python tools/index_shards.py --help`."""

import sys

from ross_mcore.commands.index_shards import main

if __name__ == "__main__":
    sys.exit(main())
