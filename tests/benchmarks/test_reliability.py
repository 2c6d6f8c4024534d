"""The reliability benchmark, but for the jobs that it watches: its parts, its figures, and that it goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kept, reliability
from benchmarks.kept import KeptParts, identity
from benchmarks.measured import RELIABILITY, section
from benchmarks.reliability import PARTS, SEEDS, Bench, Row, headline, one_in_each, stall_row
from benchmarks.requeues import exact_requeues
from benchmarks.results import tables
from benchmarks.start_up import split
from moesys.chaos.faults import KINDS, Fault
from moesys.chaos.job import Command, Watched
from moesys.chaos.outcome import Outcome
from moesys.chaos.processes import Leaks

FAULT: Row = {"seeds": 20, "survived": 20, "found_s": 0.25, "back_s": 5.0}
ROWS: dict[str, list[Row]] = {
    **{kind: [{"fault": kind, **FAULT}] for kind in KINDS},
    "stop": [{"fault": "stop", **FAULT, "found_s": 20.5, "back_s": 26.0, "survived": 15}],
    "read_only": [{"left_out": "read_only", "why": "takes root"}],
    "start_up": [{"ranks": 1, "total_s": 4.0}, {"ranks": 2, "total_s": 5.0}],
    "goodput": [{"goodput_pct": 93.0}],
    "requeues": [{"requeues": 5, "requeues_exact": 4}],
    "mutations": [{"mutations": 66, "mutations_refused": 65}],
}


def test_the_headline() -> None:
    happened = 20 * (len(KINDS) - 1)
    assert headline(ROWS) == {
        "goodput_pct": 93.0,
        "kill_found_s": 0.25,
        "kill_back_s": 5.0,
        "hang_found_s": 20.5,
        "hang_back_s": 26.0,
        "requeues_exact": 4.0,
        "mutations_refused": 65.0,
        "faults_survived_pct": 100 * (happened - 5) / happened,
        "submit_to_first_step_s": 5.0,
    }
    assert headline({"requeues": [{"left_out": "requeues", "why": "no Slurm"}]}) == {}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are measured, in their order, by a benchmark without jobs that keeps them in tmp_path."""
    names: list[str] = []

    def measure(bench: Bench, part: str) -> list[Row]:
        names.append(part)
        (bench.folder / "run").mkdir()  # fails if an earlier try has left one
        if len(names) == 3:
            raise KeyboardInterrupt
        return ROWS.get(part, [{part: 1}])

    monkeypatch.setattr(kept, "KEPT", tmp_path)
    monkeypatch.setattr(reliability, "measure", measure)
    monkeypatch.setattr(reliability, "prepared", lambda folder: folder)
    monkeypatch.setattr(reliability, "KeptParts", lambda *given: KeptParts(*given, root=tmp_path))
    return names


def test_a_run_that_was_interrupted_goes_on(measured: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        reliability.run(False, said.append)
    assert said[0].startswith(f"{PARTS[0]}: {len(PARTS)} parts and about ")
    result = reliability.run(False, said.append)
    assert measured == [*PARTS[:3], *PARTS[2:]]
    assert said.count(f"{PARTS[0]}: measured before") == 1
    assert result.is_whole
    assert result.headline == headline(ROWS)
    # A whole run is over: the next one measures again.
    reliability.run(False, said.append)
    assert measured[-len(PARTS) :] == list(PARTS)
    assert not list(tmp_path.glob("*/*"))


def test_parts_alone_are_no_whole_result_but_are_kept(measured: list[str]) -> None:
    measured += ["", "", ""]

    def silent(line: str) -> None:
        pass

    assert not reliability.run(False, silent, only=["goodput"]).is_whole
    assert not reliability.run(False, silent, seeds=2).is_whole
    measured.clear()
    measured += ["", "", ""]
    assert reliability.run(False, silent, seeds=SEEDS).is_whole
    assert "goodput" not in measured
    with pytest.raises(ValueError, match="no part kil; there are: kill, stop"):
        reliability.run(False, silent, only=["kil"])


def test_parts_count_for_the_same_code_and_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "environment", dict)
    code = tmp_path / "moesys" / "a.py"
    code.parent.mkdir()
    code.write_text("1")
    before = identity({"seeds": 20})
    assert identity({"seeds": 20}) == before
    assert identity({"seeds": 2}) != before
    code.write_text("2")
    assert identity({"seeds": 20}) != before


def test_the_page_has_a_section_for_each_kind_of_row() -> None:
    first = [{column: 1} for column in ("fault", "ranks", "faults", "requeues", "mutations")]
    rows = [{"saves": 1}, *first, {"fault": 2}, {"left_out": "x", "why": "y"}]
    record = {"command": "moesys bench", "headline": {"goodput_pct": 93.5}, "rows": rows, "env": {}}
    text = section(
        "reliability", RELIABILITY, record, str, lambda env: "here", tables, lambda *_: []
    )
    assert text.count("### ") == 7
    assert "[{'fault': 1}, {'fault': 2}]" in text
    assert "[{'figure': 'goodput_pct', 'value': 93.5}]" in text
    unmeasured = section("reliability", RELIABILITY, None, str, str, tables, lambda *_: [])
    assert unmeasured == "Not measured yet: `moesys bench reliability`.\n"


def test_a_fault_in_each_stretch() -> None:
    faults = one_in_each(3, 5, 400)
    assert faults == one_in_each(3, 5, 400)
    assert faults != one_in_each(4, 5, 400)
    assert [(fault.step - 1) // 400 for fault in faults] == [0, 1, 2, 3, 4]
    assert all(40 < (fault.step - 1) % 400 + 1 <= 360 for fault in faults)


def test_the_faults_of_goodput_are_20_restart_times_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a job that takes 4 s to come back and 20 ms a step."""
    jobs: list[tuple[int, list[Fault]]] = []

    def job(command: Command, run_dir: Path, faults: Sequence[Fault]) -> Watched:
        steps = int(command.words(run_dir)[-3].removeprefix("train.steps="))
        jobs.append((steps, list(faults)))
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "step_ms": 20.0}\n')
        return Watched(
            run_dir=run_dir,
            outcomes=[Outcome(fault=f, happened=True, back_s=4.0, steps_lost=3) for f in faults],
            losses={},
            exit_code=0,
            launches=1,
            wall_s=332.0,
            goodput_pct=94.5,
            leaks=Leaks(processes=0, ports=0, shared_memory=()),
            grown=None,
        )

    monkeypatch.setattr(reliability, "run_job", job)
    bench = Bench(folder=tmp_path, data=tmp_path, seeds=20, quick=False, say=lambda line: None)
    (row,) = reliability.goodput(bench)
    (probe_steps, probed), (steps, faults) = jobs
    assert [fault.step for fault in probed] == [110, 210, 310]
    assert probe_steps == 400
    assert steps == 4 * 20 * 200
    assert [fault.step // 4000 for fault in faults] == [0, 1, 2, 3]
    assert row["restart_times_between_faults"] == 332 / 4 / 4
    assert (row["faults"], row["faults_survived"], row["steps_lost"]) == (4, 4, 12)
    assert row["goodput_pct"] == 94.5


def records(text: str) -> list[dict[str, Any]]:
    """ "start 1:2.0 2:3.0 start 3:1.0": starts, and losses by step."""
    found: list[dict[str, Any]] = []
    for word in text.split():
        step, _, loss = word.partition(":")
        made = {"kind": "train", "step": int(step), "loss": float(loss)} if loss else {"kind": word}
        found.append(made)
    return found


@pytest.mark.parametrize(
    ("stopped", "exact"),
    [
        ("start 1:2.0 start 2:3.0 start 3:1.0 4:0.5", 2),
        ("start 1:2.0 start 2:3.0000000000000004 start 3:1.0 4:0.5", 1),
        ("start 1:2.0 start 2:3.0 3:1.0 4:0.5 start", 1),
        ("start 1:2.0 start 2:3.0 2:3.0 start 3:1.0 4:0.5", 0),
        ("start 1:2.0 start 2:3.0 start 3:1.0", 0),
    ],
)
def test_requeues_are_exact_if_every_step_after_them_is(stopped: str, exact: int) -> None:
    assert exact_requeues(records("start 1:2.0 2:3.0 3:1.0 4:0.5"), records(stopped)) == exact


def test_the_parts_of_a_start_sum_to_the_whole() -> None:
    parts = {"queue": 3.0, "import": 4.0, "configuration": 0.5, "rendezvous": 0.25, "data": 0.0}
    parts |= {"model": 0.25, "load": 0.0, "measure": 1.0}
    start = {"kind": "start", "submitted_unix_s": 100.0, "start_up_s": parts, "unix_s": 109.0}
    found = split([start, {"kind": "train", "unix_s": 110.5}, {"kind": "train", "unix_s": 120.0}])
    assert found["total"] == 10.5
    assert found["launcher"] == 3.0
    assert found["first_step"] == 1.5
    assert sum(seconds for name, seconds in found.items() if name != "total") == 10.5


def test_the_last_save_stalls_no_step() -> None:
    def save(waited_ms: float) -> Mapping[str, Any]:
        times = {"checkpoint_ms": waited_ms, "save_ms": 10.0 + waited_ms}
        return {"kind": "checkpoint", "bytes": 100, **times}

    steps = [{"kind": "train", "step_ms": ms} for ms in (40.0, 50.0, 60.0)]
    row = stall_row([*steps, save(1.0), save(4.0), save(100.0)])
    assert (row["saves"], row["stall_ms"], row["stall_max_ms"]) == (2, 2.5, 4.0)
    assert (row["step_ms"], row["stall_steps"]) == (50.0, 0.05)


def test_kept_parts_are_whole_files(tmp_path: Path) -> None:
    parts = KeptParts("x", {}, root=tmp_path)
    assert parts.get("kill") is None
    parts.put("kill", [{"found_s": 0.1}])
    assert parts.get("kill") == [{"found_s": 0.1}]
    assert [path.name for path in parts.folder.iterdir()] == ["kill.json"]
    assert json.loads((parts.folder / "kill.json").read_text()) == [{"found_s": 0.1}]
    parts.clear()
    assert parts.get("kill") is None
