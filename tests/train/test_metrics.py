"""metrics.jsonl through kills and resumes, and the views that follow it."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesys.plan.links import Link, Links
from moesys.train.metrics import MetricsLog, read_metrics
from moesys.train.progress import LiveView, Pace, PlainView, console_view, load_bar, sparkline
from moesys.train.sinks import TensorboardSink, WandbSink


def train(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "tokens": step * 64, "loss": 5.0 - step / 10, "bits_per_byte": 2.0, "lr": 1e-3,
        "grad_norm": 0.5, "tokens_per_s": 12_345.0, "mfu": 0.25, "load_imbalance": 1.5, "max_load_imbalance": 2.0,
        "dead_experts": 0, "dropped_slots": 0, "step_ms": 100.0, "data_ms": 5.0, "forward_ms": 30.0,
        "backward_ms": 50.0, "exchange_ms": 10.0, "optimizer_ms": 5.0, "checkpoint_ms": 0.0,
        "expert_load": [[10, 30], [20, 20]], **more,
    }  # fmt: skip


def start(**more: Any) -> dict[str, Any]:
    return {
        "kind": "start", "world_size": 4, "dp": 4, "ep": 2, "device": "cpu", "dtype": "fp32", "backend": "gloo",
        "expert_backend": "grouped_mm", "expert_backend_reason": "1.2 ms, loop 3.4 ms", "peak_tflops": 0.5,
        "peak_source": "measured", "parameters": 12_300_000, "active_parameters": 4_000_000,
        "flops_per_token": 2.4e7, "steps": 20, "resumed_from_step": 0, "notes": ["skipped step_9: damaged"], **more,
    }  # fmt: skip


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self, fail_at_step: int = -1) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = 0
        self.fail_at_step = fail_at_step

    def write(self, record: dict[str, Any]) -> None:
        if record.get("step") == self.fail_at_step:
            raise RuntimeError("sink is full")
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def write_steps(run_dir: Path, first: int, last: int) -> None:
    with MetricsLog(run_dir, resume_step=first - 1) as log:
        log.write(start(resumed_from_step=first - 1))
        for step in range(first, last + 1):
            log.write(train(step, run=first))


def steps_of(records: list[dict[str, Any]], kind: str = "train") -> list[int]:
    return [record["step"] for record in records if record["kind"] == kind]


def test_what_is_written_is_read_back_in_order_with_numbers_of_experts_last(tmp_path: Path) -> None:
    sink = Kept()
    records = [start(), train(1), {"kind": "eval", "step": 1, "val_loss": 4.5}, train(2)]
    with MetricsLog(tmp_path, sinks=[sink]) as log:
        for record in records:
            log.write(
                {"expert_load": record.pop("expert_load"), "expert_holders": [[1, 2]], **record}
                if "expert_load" in record
                else record
            )
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == sink.records
    assert [record["kind"] for record in found] == ["start", "train", "eval", "train"]
    assert found[1] == train(1, unix_s=found[1]["unix_s"], expert_holders=[[1, 2]])
    assert [record["unix_s"] for record in found] == sorted(record["unix_s"] for record in found)
    assert list(found[1])[-2:] == ["expert_holders", "expert_load"]
    assert sink.closed == 1


def test_each_record_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(train(1))
    assert steps_of(read_metrics(log.path)) == [1]
    log.close()


def test_resume_drops_later_steps_and_keeps_starts_and_stops(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(start())
        for step in range(1, 8):
            log.write(train(step))
            log.write({"kind": "eval", "step": step, "val_loss": 1.0})
            log.write({"kind": "checkpoint", "step": step, "bytes": 1})
        log.write({"kind": "stop", "step": 7, "reason": "SIGTERM"})
    write_steps(tmp_path, 5, 9)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert steps_of(found) == list(range(1, 10))
    assert [record.get("run") for record in found if record["kind"] == "train"] == [None] * 4 + [
        5
    ] * 5
    assert steps_of(found, "eval") == steps_of(found, "checkpoint") == [1, 2, 3, 4]
    assert [record["kind"] for record in found if record["kind"] in ("start", "stop")] == [
        "start",
        "stop",
        "start",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_beginning_drops_every_step_of_the_last(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    MetricsLog(tmp_path).close()
    kinds = [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == ["start", "undone"]


@pytest.mark.parametrize("cut_bytes", [1, 2, 9, 60])
def test_a_torn_last_line_is_left_out_then_dropped(tmp_path: Path, cut_bytes: int) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut_bytes])
    whole = [1, 2, 3] if cut_bytes == 1 else [1, 2]  # without only its newline a record is whole
    assert steps_of(read_metrics(path)) == whole
    write_steps(tmp_path, 3, 4)
    assert steps_of(read_metrics(path)) == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 6 + len(
        whole[2:]
    )  # a step that was whole is told as undone


def test_a_killed_writer_leaves_a_file_that_resumes(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom moesys.train.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 51):\n    log.write({'kind': 'train', 'step': step, 'loss': 1.0})\n"
        'os.write(os.open(log.path, os.O_WRONLY | os.O_APPEND), b\'{"kind": "tra\')\n'
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl")) == list(range(1, 51))
    write_steps(tmp_path, 41, 42)
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl")) == list(range(1, 43))


@pytest.mark.parametrize(
    "garbage", [b"{not json}\n", b"[1, 2]\n", b'{"step": 3}\n', b"\xff\xfe\n", b"\n"]
)
def test_other_garbage_is_refused_by_line_number(tmp_path: Path, garbage: bytes) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = b"".join([*lines[:2], garbage, *lines[2:]])
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not"):
        MetricsLog(tmp_path, resume_step=1)
    assert path.read_bytes() == broken


def test_not_finite_is_null_in_the_file_and_itself_for_the_sinks(tmp_path: Path) -> None:
    sink = Kept()
    with MetricsLog(tmp_path, sinks=[sink]) as log:
        log.write(train(1, loss=math.nan, grad_norm=math.inf, expert_load=[[0, 0]]))
    line = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert found["loss"] is None
    assert found["grad_norm"] is None
    assert math.isnan(sink.records[0]["loss"])


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=4) as log:
        log.write(train(5))
        with pytest.raises(AssertionError, match="step 5 after 5"):
            log.write(train(5))


def test_a_failing_sink_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    bad, good = Kept(fail_at_step=2), Kept()
    with MetricsLog(tmp_path, sinks=[bad, good]) as log:
        log.write(train(1))
        with pytest.warns(UserWarning, match="Kept failed and is off"):
            log.write(train(2))
        log.write(train(3))
    assert steps_of(bad.records) == [1]
    assert steps_of(good.records) == steps_of(read_metrics(log.path)) == [1, 2, 3]


def test_tensorboard_holds_the_scalars_and_hides_undone_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        sink = TensorboardSink(tmp_path, resume_step=first)
        with MetricsLog(tmp_path, resume_step=first, sinks=[sink]) as log:
            log.write(start())
            for step in range(first + 1, last + 1):
                log.write(train(step, loss=loss))
            log.write({"kind": "eval", "step": last, "val_loss": 3.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 9)]
    assert [(event.step, event.value) for event in events.Scalars("eval/val_loss")] == [(8, 3.0)]
    assert "train/expert_load" not in events.Tags()["scalars"]
    assert "train/step" not in events.Tags()["scalars"]


def test_wandb_writes_offline_and_a_restart_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    run_dir = tmp_path / "run"
    for first in (0, 3):
        sink = WandbSink(run_dir, project="p", name="tiny", config={"lr": 1e-3})
        with MetricsLog(run_dir, resume_step=first, sinks=[sink]) as log:
            log.write(start())
            for step in range(first + 1, first + 4):
                log.write(train(step, loss=0.123456789))
    run_id = (run_dir / "wandb_id").read_text().strip()
    files = sorted(path.name for path in (run_dir / "wandb").rglob("*.wandb"))
    assert files == [f"run-{run_id}.wandb"] * 2
    written = b"".join(path.read_bytes() for path in (run_dir / "wandb").rglob("*.wandb"))
    assert written.count(b"0.123456789") >= 6
    assert b"train/loss" in written
    assert b"expert_load" not in written


@pytest.mark.parametrize(("package", "build"), [
    ("tensorboard", lambda path: TensorboardSink(path)),
    ("wandb", lambda path: WandbSink(path, project="p", name="n", config={})),
])  # fmt: skip
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, build: Any
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("torch.utils.tensorboard", package))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        build(tmp_path)


def test_the_plain_view_prints_a_banner_and_a_line_per_interval() -> None:
    stream = io.StringIO()
    view = console_view("tiny", log_every_steps=5, stream=stream)
    assert isinstance(view, PlainView)
    view.write(start() | {"links": Links(Link(1e-5, 1e10), Link(2.5e-5, 1.25e9)).fields()})
    for step in range(1, 21):
        view.write(train(step, step_ms=30_000.0 if step in (1, 7) else 100.0, grad_norm=math.nan))
    view.write({"kind": "eval", "step": 20, "val_loss": 2.5, "val_bits_per_byte": 1.25})
    view.write({"kind": "stop", "step": 20, "reason": "finished"})
    view.close()
    lines = stream.getvalue().splitlines()
    head, lines = "\n".join(lines[:7]), lines[7:]
    assert "links  inside nodes 80 Gbit/s after 10 us, between nodes 10 Gbit/s after 25 us" in head
    assert "grouped_mm (1.2 ms, loop 3.4 ms)" in head
    assert "note  skipped step_9: damaged" in head
    assert "12.3M parameters, 4M active" in head
    assert "4 (dp 4, ep 2) on cpu, fp32, gloo" in head
    assert [line[:10] for line in lines] == [
        "step  5/20", "step 10/20", "step 15/20", "step 20/20", "step 20/20", "step 20/20",
    ]  # fmt: skip
    assert lines[1] == (
        "step 10/20  loss 4.0000  bpb 2.0000  lr 1.00e-03  grad -  tok/s 12.3k  ETA 1s  imbalance 1.50"
    )
    assert "val bpb 1.2500" in lines[4]
    assert lines[5].endswith("stopped: finished")


def test_the_live_view_shows_every_figure_and_gives_the_terminal_back() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=110, height=40, color_system=None
    )
    view = LiveView("tiny", console)
    view.write(start())
    for step in range(1, 11):
        view.write(
            train(
                step, mfu=None, grad_norm=math.inf, loss=math.nan if step == 4 else 3.0 - step / 10
            )
        )
    view.write({"kind": "eval", "step": 10, "val_loss": 2.5, "val_bits_per_byte": 1.2345})
    view.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    last = text[text.rindex("╭") :]
    for shown in ("step 10/20", "ETA 1s", "2.0000", "1.2345", "1.00e-03", "12.3k", "1.50", "MoE 0", "1.50x",
                  "forward 30%", "backward 50%", "exchange, within these, 10%", "█▇▆▅▄▃▃▂▁"):  # fmt: skip
        assert shown in last, shown
    assert text.endswith("\x1b[?25h")  # the cursor is back
    assert "nan" not in last
    assert "inf" not in last


def test_time_left_ignores_warm_up_and_stalls() -> None:
    pace = Pace()
    assert pace.remaining_s(10) is None
    pace.add(60_000.0)
    assert pace.remaining_s(10) == 600.0
    pace.add(100.0)
    assert pace.remaining_s(10) == pytest.approx(1.0)
    for step_ms in (100.0, 9_000.0, 100.0, None, math.nan):
        pace.add(step_ms)
    assert pace.remaining_s(10) == pytest.approx(1.0)
    assert pace.remaining_s(-3) == 0.0


def test_small_pictures() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([2.0], 10) == sparkline([5.0], 10) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert load_bar([0, 10, 20, 10], 8) == " ▄█▄"
    assert load_bar([1, 1, 0, 30], 2) == "▁█"
    assert load_bar([0, 0], 8) == ""


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        "os.fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink().name)
    )
    with MetricsLog(tmp_path) as log:
        log.write(train(1))
        log.sync()
    assert synced == ["metrics.jsonl"]
