"""The command `ross make-shards` as a script: `python tools/make_shards.py --help`."""

import sys

from ross_mcore.commands.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
