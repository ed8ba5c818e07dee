"""Train a ROSS model: `torchrun --nproc-per-node N pretrain_ross.py --help`."""

from ross_mcore.commands.train import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
