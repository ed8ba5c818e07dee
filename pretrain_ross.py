"""Train a ROSS model: `torchrun --nproc-per-node N pretrain_ross.py --help`."""

from ross_mcore.flags import parse


def main() -> int:
    config = parse()
    from ross_mcore.training.loop import train  # heavy imports come after the arguments are known to be good

    return train(config)


if __name__ == "__main__":  # checkpoint writers are spawned processes that import this file again
    raise SystemExit(main())
