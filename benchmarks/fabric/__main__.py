"""`python -m benchmarks.fabric`: the same as `moesys-fabric`."""

import sys

from benchmarks.fabric.command import main

if __name__ == "__main__":
    sys.exit(main())
