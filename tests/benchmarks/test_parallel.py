"""The parallel benchmark: rows have the form, a wrong formula shows, calls are noted and made again, figures add up."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import parallel
from benchmarks.calls import Calls
from benchmarks.results import Result, form_faults, write_result
from moesys.testing.ranks import run_ranks
from tests import figures

SLEEP_S = 0.3


def compare_ep() -> Result:
    axes = {"ep": parallel.AXES["ep"]}
    rows = parallel.compare(parallel.QUICK, axes, rounds=1, steps=1, progress=print)
    return Result(headline=parallel._headline(rows), rows=rows)


def test_a_row_has_exact_bytes_and_the_form(tmp_path: Path) -> None:
    result = compare_ep()
    (row,) = result.rows
    assert row["exact_on_all_ranks"]
    assert row["sent_bytes"] == row["formula_bytes"] != 0
    assert row["step_ratio"] == row["step_ms"] / row["one_rank_ms"]
    path = write_result("parallel", result.headline, result.rows, "x", quick=True, folder=tmp_path)
    assert not form_faults(json.loads(path.read_text()))


def test_a_wrong_formula_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parallel.formula

    def wrong(*args):
        return {key: value + 1 for key, value in right(*args).items()}

    monkeypatch.setattr(parallel, "formula", wrong)
    (row,) = compare_ep().rows
    assert not row["exact_on_all_ranks"]
    assert row["sent_bytes"] != row["formula_bytes"]


def hidden_and_exposed(rank: int, size: int) -> tuple[float, float, list[tuple[str, int]]]:
    """Rank 1 comes late to two reductions; only the second one makes rank 0 wait."""
    calls = Calls()
    x = torch.ones(4)
    with calls.noting():
        if rank == 1:
            time.sleep(SLEEP_S)
        work = dist.all_reduce(x, async_op=True)
        if rank == 0:
            time.sleep(2 * SLEEP_S)
        assert work is not None
        work.wait()
        if rank == 1:
            time.sleep(2 * SLEEP_S)
        dist.all_reduce(x)
    dist.all_reduce(x)  # not noted
    return calls.exposed_s, calls.again(), calls.order


def test_exposed_is_what_the_computing_thread_waits() -> None:
    (exposed_s, again_s, order), _ = run_ranks(hidden_and_exposed, 2)
    assert SLEEP_S / 2 < exposed_s < 2.5 * SLEEP_S
    assert again_s < exposed_s
    assert order == [("call", 0), ("wait", 0), ("call", 1), ("wait", 1)]


def test_wrong_layouts_are_refused() -> None:
    from tests.config.test_wrong_layouts import WRONG

    assert len(parallel.refused_layouts()) == len(WRONG)


def test_figures_of_suites_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "build" / "figures.jsonl"
    monkeypatch.delenv("MOESYS_FIGURES", raising=False)
    figures.count("flips", 3)
    assert parallel.reported_figures() == {}
    monkeypatch.setenv("MOESYS_FIGURES", str(path))
    assert parallel.reported_figures() == {}
    for amount, error in ((3, 0.5), (4, 0.25)):
        figures.count("flips", amount)
        figures.worst("error_pct", error)
    assert parallel.reported_figures() == {"flips": 7.0, "error_pct": 0.5}
