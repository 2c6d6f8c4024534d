"""What the eye outside sees of a run's records, also where a file takes another's place."""

import json
from pathlib import Path

from moesys.chaos.eye import Eye
from moesys.train.metrics import FILE_NAME


def line(kind: str, step: int, loss: float = 0.0) -> str:
    more = {"loss": loss, "unix_s": float(step)} if kind == "train" else {"resumed_from_step": step}
    return json.dumps({"kind": kind, "step": step, **more}) + "\n"


def replace(path: Path, *lines: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(lines))
    beside.replace(path)


def test_each_record_is_seen_once_whatever_replaces_the_file(tmp_path: Path) -> None:
    eye, path = Eye(tmp_path, 0), tmp_path / FILE_NAME
    kept = [line("start", 0), line("train", 1, 5.0)]
    eye.look()
    path.write_text("".join([*kept, line("train", 2, 4.0)])[:-5])
    eye.look()
    assert [(e.kind, e.step) for e in eye.events] == [("start", 0), ("step", 1)]
    path.write_text("".join([*kept, line("train", 2, 4.0)]))
    eye.look()
    # A roll back, and more was written before anybody looked.
    replace(path, *kept, line("undone", 1), line("anomaly", 2), line("train", 2, 3.5))
    eye.look()
    assert [(e.kind, e.step) for e in eye.events[2:]] == [("step", 2), ("said", 2), ("step", 2)]
    assert eye.losses == {1: 5.0, 2: 3.5}
    # A restart.
    replace(path, *kept, line("undone", 1), line("anomaly", 2), line("start", 1))
    eye.look()
    assert [(e.kind, e.step) for e in eye.events[5:]] == [("start", 1)]
