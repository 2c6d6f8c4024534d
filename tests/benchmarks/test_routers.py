"""What the routers' benchmark makes of its sweeps, and a smoke run of it."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import routers
from benchmarks.measured import ROUTERS, section
from benchmarks.results import ROOT, tables

BALANCE = [
    {"balance counted over": routers.MICRO, "val_loss": 3.5},
    {"balance counted over": routers.GLOBAL, "val_loss": 3.25},
]
ROUTER = {"router": "a", "val_loss": 1.0}
ORACLES = {"oracle tests": 2, "passed": 2}


def test_global_is_better_below_zero() -> None:
    assert routers.difference([ROUTER, *BALANCE]) == -0.25


def test_one_sweep_keeps_the_rows_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is whole with them."""
    line = {"runs": 3, "val_loss_sd": None, "load_imbalance": 1.0, "step_ms": 1, "step_ratio": 1}
    for name in routers.SWEEPS:
        folder = tmp_path / f"{name}.sweep"
        folder.mkdir()
        (folder / "table.svg").touch()
    monkeypatch.setattr(routers, "kept_folder", lambda name: tmp_path / f"{name}.sweep")
    monkeypatch.setattr(routers, "_oracles", lambda: ORACLES)
    monkeypatch.setattr(routers, "RESULTS", tmp_path)
    monkeypatch.setattr(routers, "PICTURES", tmp_path)
    monkeypatch.setattr(
        routers, "_sweep", lambda *_: [line | {"row": r, "val_loss": 2.0} for r in ("a", "b")]
    )
    first = routers.run(False, lambda line: None, only=["routers"])
    assert first.is_whole
    assert "global_minus_micro_val_loss" not in first.headline
    assert [row.get("router") for row in first.rows] == ["a", "b", None]
    before = {"rows": [*BALANCE, ROUTER, ORACLES], "command": "before", "env": {}}
    (tmp_path / "routers.json").write_text(json.dumps(before))
    second = routers.run(False, lambda line: None, only=["routers"])
    assert second.headline["global_minus_micro_val_loss"] == -0.25
    assert [row.get("router") for row in second.rows] == [None, None, "a", "b", None]
    with pytest.raises(ValueError, match="no part balanse; there are routers, balance"):
        routers.run(False, lambda line: None, only=["balanse"])


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
    text = section("routers", ROUTERS, record, str, lambda env: "here", tables, lambda *_: [])
    assert text.count("### ") == 3
    assert "routers_compared.svg" in text


@pytest.mark.parity
def test_a_smoke_run(tiny_data, monkeypatch) -> None:
    monkeypatch.setattr(routers, "QUICK", [*routers.QUICK, f"data.path={tiny_data}"])
    result = routers.run(True, lambda line: None)
    assert not result.is_whole
    assert result.headline["router_oracles_passed"] >= 20
    assert [row for row in result.rows if "router" in row] != []
