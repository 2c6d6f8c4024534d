"""`python -m moesys.train [--config-dir DIR] OVERRIDES...` or `--config FILE`: one rank of a job, as torchrun starts it."""

import argparse
import os
import sys
from pathlib import Path

from moesys.train.job import main


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moesys.train",
        description="Train as one rank of the job that torchrun describes, or alone.",
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder of your own with configuration groups"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="a resolved configuration, instead of overrides"
    )
    parser.add_argument("overrides", nargs="*", help="e.g. experiment=quickstart optim.lr=1e-3")
    given = parser.parse_args(arguments)
    if given.config is not None and (given.overrides or given.config_dir):
        parser.error("--config is a whole configuration: give no overrides and no --config-dir")
    return given


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    prepare = None
    if os.environ.get("MOESYS_CHAOS"):  # faults on purpose, else nothing of them is imported
        from moesys.chaos.inject import arm as prepare
    try:
        sys.exit(main(given.overrides, given.config_dir, given.config, prepare))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
