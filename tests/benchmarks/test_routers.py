"""What the routers' benchmark makes of its sweeps, and a smoke run of it."""

from pathlib import Path

import pytest
import yaml

from benchmarks import routers
from benchmarks.measured import ROUTERS, section
from benchmarks.results import ROOT, tables

BALANCE = [{"row": routers.MICRO, "val_loss": 3.5}, {"row": routers.GLOBAL, "val_loss": 3.25}]


def test_global_is_better_below_zero() -> None:
    assert routers.difference(BALANCE) == -0.25


def test_the_rows_that_are_compared_are_in_the_sweeps() -> None:
    found = {
        name: yaml.safe_load((ROOT / "benchmarks" / "sweeps" / f"{name}.yaml").read_text())
        for name in routers.SWEEPS
    }
    assert {routers.MICRO, routers.GLOBAL} <= found["balance"].keys()
    swept = {word for words in found["routers"].values() for word in words}
    files = {path.stem for path in Path(ROOT, "configs", "router").glob("*.yaml")}
    by_decree = {"round_robin", "zipf", "replay", "replay_loads"}
    assert {f"router={name}" for name in files - by_decree} <= swept


def test_the_page_has_each_table() -> None:
    rows = [{"router": "a"}, {"balance counted over": "b"}, {"oracle tests": 1}]
    record = {
        "command": "moesys bench routers",
        "headline": {"routers": 2},
        "rows": rows,
        "env": {},
    }
    text = section("routers", ROUTERS, record, str, lambda env: "here", tables)
    assert text.count("### ") == 3
    assert "routers_compared.svg" in text


@pytest.mark.parity
def test_a_smoke_run(tiny_data, monkeypatch) -> None:
    monkeypatch.setattr(routers, "QUICK", [*routers.QUICK, f"data.path={tiny_data}"])
    result = routers.run(True, lambda line: None)
    assert not result.is_whole
    assert result.headline["router_oracles_passed"] >= 20
    assert [row for row in result.rows if "router" in row] != []
