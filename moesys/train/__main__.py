"""`python -m moesys.train OVERRIDES...`: one rank of a job, as torchrun starts it."""

import sys

from moesys.train.job import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
