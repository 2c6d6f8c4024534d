"""pyproject.toml declares what the package imports, and nothing else."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["dependencies"]}
EXTRAS = {
    re.split(r"[<>=\[]", line)[0]
    for lines in PROJECT["optional-dependencies"].values()
    for line in lines
}
FROM_THE_TREE = {"moesys", "benchmarks"}


def imported_distributions() -> dict[str, set[str]]:
    """Distribution to the modules of the package that import it, at whatever level."""
    providers = importlib.metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in (ROOT / "moesys").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in FROM_THE_TREE:
                    continue
                distribution = providers.get(top, [top])[0].lower().replace("_", "-")
                found.setdefault(distribution, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared_and_every_core_dependency_is_imported() -> None:
    imported = imported_distributions()
    undeclared = {name: files for name, files in imported.items() if name not in CORE | EXTRAS}
    assert not undeclared
    assert not CORE - set(imported), "declared as needed, imported nowhere"
