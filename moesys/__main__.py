"""The command `moesys` in a process of its own, installed or as `python -m moesys`."""

import gc
import sys
from typing import NoReturn

from moesys.cli import main

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Importing torch makes a million objects that stay; by Python's 700 a fifth of that time looks through them."""


def command() -> NoReturn:
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    exit_code = main()
    gc.freeze()  # nor are they looked through at the exit
    sys.exit(exit_code)


if __name__ == "__main__":
    command()
