"""The command `moesys`: one module per subcommand, each with `add_parser(subparsers)` and `run(args)`.

Those modules import only the standard library at the top, so that --help is instant.
"""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from moesys.cli import (
    bench,
    chaos,
    ckpt,
    config,
    doctor,
    launch,
    plan,
    prep,
    report,
    route,
    runs,
    sweep,
    train,
)

_COMMANDS: dict[str, Any] = {
    "train": train,
    "prep": prep,
    "config": config,
    "plan": plan,
    "report": report,
    "ckpt": ckpt,
    "bench": bench,
    "doctor": doctor,
    "launch": launch,
    "runs": runs,
    "sweep": sweep,
    "route": route,
    "chaos": chaos,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code: 2 for what the user can correct, said in one message."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(_COMMANDS)}"
        parser.error(f"{name!r} is not a command: {hint}")
    args, rest = parser.parse_known_args(arguments)
    if rest:
        # argparse takes overrides in one stretch; those after an option come here.
        unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
        if unknown:
            parser.error(
                f"{args.command} does not take {' '.join(unknown)}: see moesys {args.command} --help"
            )
        args.overrides += rest
    try:
        return _COMMANDS[args.command].run(args)
    except ValueError as error:
        if args.traceback:
            traceback.print_exc()
        print(f"moesys {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (| head): silence the flush at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    from moesys import __version__

    parser = argparse.ArgumentParser(
        prog="moesys",
        description="Train Mixture-of-Experts language models on clusters.",
        epilog="moesys COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"moesys {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS.values():
        command.add_parser(subparsers)
    return parser
