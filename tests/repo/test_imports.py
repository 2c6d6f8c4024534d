"""Who may import whom, and the other rules of the package that its syntax tree can decide.

Every import counts for the rooms: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCHEMA = (
    "config.batch_schema",
    "config.data_schema",
    "config.component_schema",
    "config.dispatch_schema",
    "config.optim_schema",
    "config.placement_schema",
    "config.schema",
)
"""What every key of a configuration is."""
ROOMS: dict[str, tuple[str, ...]] = {
    "moesys": (),
    "config.batch_schema": (),
    "config.data_schema": (),
    "config.component_schema": (),
    "config.dispatch_schema": ("config.component_schema",),
    "config.optim_schema": (),
    "config.placement_schema": (),
    "config.schema": SCHEMA,
    # Integers: the rules ask the equations themselves.
    "config": ("config", "parallel.dims", "plan"),
    "ops": ("ops",),
    "plan": ("plan", "config.schema", "config.dispatch_schema", "config.placement_schema"),
    "parallel": ("parallel", "plan", "ops", "config.schema"),
    "profile": ("profile", "parallel", "plan", "ops", "config.schema"),
    "moe": (
        *("moe", "parallel", "plan", "ops"),
        *("config.schema", "config.dispatch_schema", "config.constructor"),
    ),
    "models": ("models", "moe", "ops", "parallel.context", "plan.batch.local", "config.schema"),
    "parallelize": (
        "parallelize",
        "models",
        "moe",
        "parallel",
        "profile",
        "plan",
        "ops",
        *("config.schema", "config.dispatch_schema"),
    ),
    "data": ("data", "parallel", "plan", "ops", "config.schema"),
    "optim": ("optim", "parallel", "plan", "ops", "config.schema"),
    "checkpoint": ("checkpoint", "models", "moe", "parallel", "ops", "config.schema"),
    "report": ("report", "plan", "config.schema"),
    "integrations": (
        "integrations",
        "models",
        "moe",
        "parallel",
        "parallelize",
        "plan",
        "ops",
        "config",
    ),
    "testing": (
        *("testing", "train", "optim", "parallelize", "models", "moe", "parallel", "data", "plan"),
        *("ops", "config"),
    ),
    "train": (
        *(
            "train",
            "launch.status",
            "report",
            "integrations",
            "checkpoint",
            "optim",
            "data",
            "parallelize",
            "models",
            "moe",
        ),
        *("profile", "parallel", "plan", "ops", "config"),
    ),
    "launch": ("launch", "config", "plan", "report.records"),
    "launch.status": (),
    "chaos": (
        *("chaos", "train", "launch.snapshot", "report", "checkpoint", "models", "moe", "parallel"),
        *("ops", "config"),
    ),
    # The one door for faults on purpose: nothing of it is imported where none are asked for.
    "train.__main__": ("train", "chaos"),
    "doctor": ("doctor", "checkpoint", "profile", "parallel", "plan", "ops", "config.schema"),
    "route": (
        *("route", "checkpoint", "models", "moe", "parallelize", "data", "report", "config"),
    ),
    "grow": ("grow", "checkpoint", "models", "moe", "data", "plan", "config"),
    "sweep": ("sweep", "launch", "report", "train.metrics"),
    "cli": ("",),
    "__main__": ("cli",),
}
"""What each room may import (a prefix; "" is all of moesys). The most specific room decides."""

NO_TORCH = ("config", "launch", "plan", "report", "parallel.dims")
"""Rooms that run on a login node, or for a cluster that does not exist."""
NO_CLOCK_OR_MACHINE = ("plan",)
HYDRA = {"hydra", "omegaconf"}
HYDRA_ROOM = "config.compose"
HEAVY = {
    "apex": (),
    "deepspeed": ("integrations.deepspeed",),
    "matplotlib": (),
    "megatron": ("integrations.megatron",),
    "mpi4py": (),
    "scipy": (),
    "tensorboard": (),
    "transformers": (),
    "triton": ("ops.triton",),
    "wandb": (),
}
"""Imported where they are used, except in the modules that are about them."""
RUNS_CODE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
RUNS_CODE_ROOM = "testing.ranks"  # between processes of one test, never from a file
STATE_ROOM = "parallel.bootstrap"
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 450


@dataclass(frozen=True)
class Imported:
    name: str  # the dotted name, as far as it can be told: module.attribute for `from module import attribute`
    line: int
    in_function: bool
    for_types: bool


def imports(tree: ast.Module) -> Iterator[Imported]:
    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            typing = for_types or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            names: list[str] = []
            match child:
                case ast.Import():
                    names = [alias.name for alias in child.names]
                case ast.ImportFrom():
                    names = [
                        f"{'.' * child.level}{child.module or ''}.{a.name}" for a in child.names
                    ]
                case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                    func
                ).endswith(("import_module", "__import__")):
                    names = [name]
            yield from (Imported(name, child.lineno, in_function, for_types) for name in names)  # type: ignore[attr-defined]
            yield from visit(child, inside, typing)

    return visit(tree, False, False)


def is_under(name: str, room: str) -> bool:
    return room == "" or name == room or name.startswith(f"{room}.")


def faults(module: str, source: str) -> list[str]:
    """Every rule that `module` (its name within moesys, "" for the package itself) breaks."""
    tree = ast.parse(source)
    room = max((r for r in ROOMS if is_under(module or "moesys", r)), key=len, default=None)
    if room is None:
        return [
            f"{module} is in no room of tests/repo/test_imports.py: add it, and to docs/architecture.md"
        ]
    found: list[str] = []
    for imported in imports(tree):
        where = f"line {imported.line}: {imported.name}"
        top, _, rest = imported.name.partition(".")
        at_run_time = not imported.in_function and not imported.for_types
        if top == "":
            found.append(f"{where}: write imports in full, from moesys")
        if top == "moesys" and rest and rest != "__version__":
            if not any(is_under(rest, allowed) for allowed in ROOMS[room]):
                found.append(f"{where}: {room} may import {ROOMS[room] or 'nothing'}")
            if imported.in_function and room != "cli":
                found.append(f"{where}: a function-level import of our own hides a cycle")
        if top == "torch" and any(is_under(module, r) for r in NO_TORCH):
            found.append(f"{where}: {room} works without torch")
        if top in {"time", "psutil", "socket"} and any(
            is_under(module, r) for r in NO_CLOCK_OR_MACHINE
        ):
            found.append(f"{where}: a plan reads numbers, no clock and no machine")
        if top in HYDRA and module != HYDRA_ROOM:
            found.append(f"{where}: only {HYDRA_ROOM} knows Hydra")
        heavy = "tensorboard" if imported.name.startswith("torch.utils.tensorboard") else top
        if heavy in HEAVY and at_run_time and not any(is_under(module, r) for r in HEAVY[heavy]):
            found.append(f"{where}: optional and heavy, import it in the function that uses it")
        if top in RUNS_CODE and module != RUNS_CODE_ROOM:
            found.append(f"{where}: can run code that a file holds")
        standard = top in sys.stdlib_module_names
        of_schema = any(is_under(imported.name, f"moesys.{part}") for part in SCHEMA)
        if module in SCHEMA and not standard and not of_schema:
            found.append(f"{where}: the schema needs the standard library only")
        if (
            room == "cli"
            and at_run_time
            and not standard
            and not is_under(imported.name, "moesys.cli")
        ):
            found.append(f"{where}: the command line starts fast, import it in the function")
    found.extend(state_faults(module, tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec"}:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)} runs what it is given")
    if tree.body and ast.get_docstring(tree) is None:
        found.append("line 1: a module says in a docstring what it is")
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{lines} lines; one reading is about 400, and {MAX_LINES} the limit")
    return found


def state_faults(module: str, tree: ast.Module) -> Iterator[str]:
    """Process-wide state: `global`, and containers made empty at the top, which exist only to be filled."""
    if module == STATE_ROOM:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}: process-wide state lives in {STATE_ROOM}"
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        match node.value:
            case ast.Dict(keys=[]) | ast.List(elts=[]):
                empty = True
            case ast.Call(func=func, args=[]) if ast.unparse(func).rpartition(".")[2] in {
                *(
                    "dict",
                    "list",
                    "set",
                    "deque",
                    "OrderedDict",
                    "WeakKeyDictionary",
                    "WeakValueDictionary",
                ),
            }:
                empty = True
            case ast.Call(func=func) if ast.unparse(func).rpartition(".")[2] in {
                "defaultdict",
                "Counter",
            }:
                empty = True
            case _:
                empty = False
        if empty:
            yield f"line {node.lineno}: a container that is filled later is process-wide state"


def modules() -> dict[str, Path]:
    package = ROOT / "moesys"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", modules())
def test_module_keeps_the_rules(module: str) -> None:
    found = faults(module, modules()[module].read_text())
    assert not found, "\n".join([f"moesys.{module}:", *found])


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("config.schema", "import moesys.ops", "may import ('config.batch_schema',"),
        ("config.data_schema", "import moesys.ops", "may import nothing"),
        ("config.data_schema", "import yaml", "standard library only"),
        ("config.schema", "import numpy", "standard library only"),
        ("config.build", "import torch", "without torch"),
        ("config.validate", "from omegaconf import DictConfig", "knows Hydra"),
        ("ops.permute", "def f():\n    from moesys.config import schema", "may import"),
        ("plan.layout", "from moesys import config", "may import"),
        ("plan.layout", "from moesys.config.compose import compose", "may import"),
        ("plan.layout", "import time", "no clock"),
        ("moe.layer", "if TYPE_CHECKING:\n    from moesys.models import attention", "may import"),
        (
            "moe.layer",
            "import importlib\nimportlib.import_module('moesys.train.step')",
            "may import",
        ),
        ("moe.layer", "from . import routing", "in full"),
        ("moe.layer", "def f():\n    import moesys.ops", "hides a cycle"),
        ("models.attention", "import moesys.parallel.mesh", "may import"),
        ("train.step", "from moesys.cli import bench", "may import"),
        ("train.sinks", "from torch.utils.tensorboard import SummaryWriter", "optional and heavy"),
        ("checkpoint.huggingface", "import transformers", "optional and heavy"),
        ("checkpoint.store", "import pickle", "run code"),
        ("checkpoint.store", "x = eval('1')", "runs what it is given"),
        ("cli.plan", "import torch", "starts fast"),
        ("cli.plan", "from moesys.plan import layout", "starts fast"),
        ("moe.layer", "def f():\n    global x", "process-wide"),
        ("moe.layer", "_cache: dict[int, int] = {}", "process-wide"),
        ("moe.layer", "import collections\n_seen = collections.defaultdict(int)", "process-wide"),
        ("moe.layer", "x = 1", "docstring"),
        ("moe.layer", '"""Doc."""\n' + "x = 1\n" * 450, "lines"),
        ("elsewhere.new", "", "in no room"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, rule: str) -> None:
    assert any(rule in fault for fault in faults(module, source)), faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", '__version__ = "1"'),
        ("config.compose", "from hydra import compose\nfrom moesys.config.schema import RunConfig"),
        ("moe.layer", "import torch\nfrom moesys.parallel import exchange\nKNOWN = {'a': 1}"),
        ("checkpoint.huggingface", "def f():\n    import transformers"),
        ("integrations.megatron", "from megatron.core import parallel_state"),
        (
            "cli.bench",
            "import ast\ndef f():\n    import torch\n    from moesys.train import trainer",
        ),
        ("parallel.bootstrap", "_groups = {}"),
        ("train.step", "from moesys import __version__"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert not faults(module, f'"""Doc."""\n{source}')


def test_file_names_say_what_is_inside() -> None:
    folders = ("moesys", "tests", "benchmarks", "csrc", "launch")
    paths = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"
    ]
    assert paths
    assert not [path for path in paths if path.stem.removeprefix("test_") in BANNED_NAMES]
