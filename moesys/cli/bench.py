"""`moesys bench`: run benchmarks of the source tree and keep what they find.

Benchmarks live in benchmarks/ beside the package and are no part of an installed wheel;
benchmarks/results.py says what a benchmark is and what its result looks like.
"""

import argparse
import ast
import importlib
import inspect
import json
import shlex
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="run benchmarks and write their results",
        description="Run benchmarks. Results go to benchmarks/results, with --quick or fewer seeds than count to build/bench-quick; parts that are not run again are kept.",
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="which ones; 'all' = every one there is"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of a few seconds each; figures mean little",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help="tries of each kind, for a benchmark of things by chance",
    )
    parser.add_argument(
        "--only", metavar="PART,...", help="parts of a long benchmark; kept for when all are run"
    )
    parser.add_argument("--json", action="store_true", help="print each result as one line of JSON")
    parser.add_argument("--list", action="store_true", help="print the names and what they measure")


def run(args: argparse.Namespace) -> int:
    folder = benchmarks_folder()
    known = descriptions(folder)
    if args.list or not args.names:
        for name, description in known.items():
            print(f"{name:16}{description}")
        if not known:
            print(f"no benchmarks in {folder}")
        return 0
    names = list(known) if args.names == ["all"] else args.names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"no benchmark {', '.join(unknown)}; there are: {', '.join(known) or 'none'}"
        )
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    from benchmarks.results import write_result

    for name in names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        options = _options(args, name, benchmark)
        result = benchmark.run(args.quick, _say, **options)
        words = ["moesys", "bench", name, *(["--quick"] if args.quick else [])]
        for option, value in options.items():
            words += [f"--{option}", ",".join(value) if isinstance(value, list) else str(value)]
        quick = args.quick or not result.is_whole
        result_name = getattr(benchmark, "RESULT", f"{name}_{_device(benchmark)}")
        path = write_result(
            result_name,
            result.headline,
            result.rows,
            shlex.join(words),
            quick=quick,
            sources=result.sources,
        )
        if args.json:
            print(json.dumps(json.loads(path.read_text())), flush=True)
        else:
            _show(result_name, result, path)
    return 0


def _options(args: argparse.Namespace, name: str, benchmark: Any) -> dict[str, Any]:
    """What was given of the options that not every benchmark has. ValueError if this one has not."""
    given = {"seeds": args.seeds, "only": args.only and args.only.split(",")}
    options = {option: value for option, value in given.items() if value is not None}
    known = inspect.signature(benchmark.run).parameters
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"--{unknown[0]}: benchmark {name} has no such option: leave it out")
    return options


def _device(benchmark: Any) -> str:
    """Where the benchmark ran: one that knows GPUs uses them where there are any."""
    import torch

    return "gpu" if getattr(benchmark, "GPU", False) and torch.cuda.is_available() else "cpu"


def benchmarks_folder() -> Path:
    """The benchmarks/ beside the package. ValueError where moesys was installed without its sources."""
    import moesys

    folder = Path(moesys.__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "results.py").is_file():
        raise ValueError(
            f"benchmarks are part of the source tree, and there is no {folder}: run from a clone"
        )
    return folder


def descriptions(folder: Path) -> dict[str, str]:
    """Name and DESCRIPTION of each benchmark in `folder`, read without importing any."""
    found = {}
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        name = path.parent.name if path.stem == "__init__" else path.stem
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.Assign(
                    targets=[ast.Name(id="DESCRIPTION")], value=ast.Constant(value=str(text))
                ):
                    found[name] = text
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(name: str, result: Any, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.results import cell_text, tables

    console = Console()
    figures = [{"figure": key, "value": value} for key, value in result.headline.items()]
    for rows in [*tables(result.rows), figures]:
        columns = list(rows[0])
        table = Table(*columns, title=name)
        for row in rows:
            table.add_row(*(cell_text(row[c]) for c in columns))
        if console.measure(table).maximum <= console.width:
            console.print(table)
        else:  # squeezed columns cannot be read
            for row in rows:
                cells = (
                    f"{key} {cell_text(value)}" for key, value in row.items() if value is not None
                )
                console.print("  ".join(cells), highlight=False)
    console.print(f"{path}", soft_wrap=True)
