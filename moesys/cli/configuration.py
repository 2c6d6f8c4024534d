"""How commands take a configuration: the same words for all of them, and modules of the working folder."""

import argparse
import os
import sys
from pathlib import Path


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir", metavar="DIR", type=Path, help="a folder of your own groups, as in configs/"
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """With the folder that they may name files of."""
    add_config_dir(parser)
    parser.add_argument(
        "overrides", metavar="OVERRIDE", nargs="*", help="group=option or section.key=value"
    )


def import_from_working_folder() -> None:
    """As under `python -m`, so that a router in the working folder is found from the script too."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
