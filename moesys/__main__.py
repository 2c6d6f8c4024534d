"""`python -m moesys` is the command `moesys`."""

import sys

from moesys.cli import main

if __name__ == "__main__":
    sys.exit(main())
