"""Every branch of every judge, from facts."""

import dis
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

import pytest

import moesys.doctor
from moesys.doctor.finding import worst
from tests.doctor import cluster_cases, local_cases
from tests.doctor.cluster_cases import CLUSTER_CASES
from tests.doctor.local_cases import CASES, Case


@pytest.mark.parametrize(
    "case", [*CASES, *CLUSTER_CASES], ids=lambda case: f"{case.findings[-1].name}-{case.says}"
)
def test_facts_come_to_their_level(case: Case) -> None:
    assert worst(case.findings) == case.level
    said = [f.detail for f in case.findings if f.level == case.level]
    assert any(case.says in detail for detail in said), said
    assert all((f.fix != "") == (f.level != "ok") for f in case.findings)


def judges() -> Iterator[Callable]:
    for module in pkgutil.iter_modules(moesys.doctor.__path__):
        loaded = importlib.import_module(f"moesys.doctor.{module.name}")
        for name, value in vars(loaded).items():
            if name.startswith("judge_") and value.__module__ == loaded.__name__:
                yield value


def lines(code: CodeType) -> set[int]:
    own = {line for _, line in dis.findlinestarts(code) if line and line > code.co_firstlineno}
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return own.union(*(lines(code) for code in inner))


def test_the_cases_run_every_line_of_every_judge() -> None:
    wanted = {
        (judge.__code__.co_filename, line) for judge in judges() for line in lines(judge.__code__)
    }
    files = {file for file, _ in wanted}
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        if frame.f_code.co_filename not in files:
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        importlib.reload(local_cases)
        importlib.reload(cluster_cases)
    finally:
        sys.settrace(before)
    assert len(wanted) > 200
    assert not sorted(wanted - seen)
