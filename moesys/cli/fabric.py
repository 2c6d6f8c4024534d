"""`moesys-fabric`: the emulated cluster of benchmarks/fabric, which is no part of an installed wheel."""

import sys

from moesys.cli.bench import benchmarks_folder


def main() -> int:
    """Return the exit code: 2 for what the user can correct, said in one message."""
    try:
        folder = benchmarks_folder()
    except ValueError as error:
        print(f"moesys-fabric: {error}", file=sys.stderr)
        return 2
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    from benchmarks.fabric.command import main as fabric

    return fabric()
