"""`python -m moesys.train`: one rank of a job, as torchrun, srun and mpirun start it."""

import os
import sys

from moesys.train.arguments import parse
from moesys.train.signals import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()
    given = parse(sys.argv[1:])
    from moesys.train.job import main  # torch takes seconds, in which a signal may come

    prepare = None
    if os.environ.get("MOESYS_CHAOS"):  # faults on purpose, else nothing of them is imported
        from moesys.chaos.inject import arm as prepare
    try:
        sys.exit(main(given.overrides, given.config_dir, given.config, prepare))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
