"""`python -m moesys.train [--config-dir DIR] OVERRIDES...`: one rank of a job, as torchrun starts it."""

import argparse
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
    parser.add_argument("overrides", nargs="*", help="e.g. experiment=quickstart optim.lr=1e-3")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    try:
        sys.exit(main(given.overrides, given.config_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
