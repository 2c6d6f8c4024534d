"""The console's view of a run: a live panel on a terminal, one line per log interval elsewhere.

Both are sinks of the same records as metrics.jsonl. Nothing here reads a clock: times come from the
records, so the views are tested by feeding records. A figure that is missing or not finite shows as "-".
"""

import itertools
import math
import statistics
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, TypeGuard

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moesys.report.anomalies import anomaly_line
from moesys.report.goodput import goodput_lines
from moesys.train.metrics import Sink
from moesys.train.straggler import straggler_line

_PART_COLOURS = {"data": "magenta", "forward": "blue", "backward": "cyan", "optimizer": "green"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 48
_LAYER_LINES = 12
_RECENT_STEPS = 50

_WITHOUT_IT = "warning: {reason}\nTraining goes on without it"


def console_view(run_name: str, *, log_every_steps: int, stream: TextIO | None = None) -> Sink:
    """The view that suits `stream` (default: stdout): live on a terminal, plain lines elsewhere."""
    console = Console(file=stream or sys.stdout)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(run_name, console)
    return PlainView(run_name, log_every_steps=log_every_steps, stream=stream or sys.stdout)


class Pace:
    """Time left, from the median of recent steps: compiling, warm-up and stalls do not count."""

    def __init__(self) -> None:
        self._recent_ms: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._steps_seen = 0

    def add(self, step_ms: float | None) -> None:
        self._steps_seen += 1
        if self._steps_seen == 2:
            self._recent_ms.clear()  # the first step pays for start-up; keep it only while it is all we know
        if finite(step_ms):
            self._recent_ms.append(step_ms)

    def remaining_s(self, steps_left: int) -> float | None:
        """Seconds for `steps_left` more steps, or None before the first step."""
        if not self._recent_ms:
            return None
        return max(0, steps_left) * statistics.median(self._recent_ms) / 1e3


class PlainView:
    """The banner, then one line for each `log_every_steps`-th step, evaluation, anomaly, straggler and stop."""

    def __init__(self, run_name: str, *, log_every_steps: int, stream: TextIO) -> None:
        self._run_name = run_name
        self._log_every_steps = log_every_steps
        self._stream = stream
        self._steps = 0
        self._pace = Pace()

    def write(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self._steps = record.get("steps") or 0
            self._print(banner(self._run_name, record))
        elif kind == "train":
            self._pace.add(record.get("step_ms"))
            step = record["step"]
            if step % self._log_every_steps == 0 or step == self._steps:
                self._print(self._train_line(record))
        elif kind == "eval":
            self._print(
                f"{self._step_text(record['step'])}  val loss {number(record.get('val_loss'), '.4f')}"
                f"  val bpb {number(record.get('val_bits_per_byte'), '.4f')}"
                f"{_by_source(record.get('val_loss_by_source') or {})}"
            )
        elif kind == "mixing":
            self._print(f"{self._step_text(record['step'])}  {_weights(record)}")
        elif kind == "codecs":
            self._print(f"{self._step_text(record['step'])}  {_codecs(record)}")
        elif kind == "checkpoint_failed":
            self._print(_WITHOUT_IT.format(**record))
        elif kind == "anomaly":
            self._print(f"{self._step_text(record['step'])}  {anomaly_line(record)}")
        elif kind == "straggler":
            self._print(f"{self._step_text(record['step'])}  {straggler_line(record)}")
        elif kind == "goodput":
            self._print("\n".join(goodput_lines(record)))
        elif kind == "stop":
            self._print(f"{self._step_text(record['step'])}  stopped: {record.get('reason', '-')}")

    def close(self) -> None:
        self._stream.flush()

    def _train_line(self, record: Mapping[str, Any]) -> str:
        return "  ".join(
            (
                self._step_text(record["step"]),
                f"loss {number(record.get('loss'), '.4f')}",
                f"bpb {number(record.get('bits_per_byte'), '.4f')}",
                f"lr {number(record.get('lr'), '.2e')}",
                f"grad {number(record.get('grad_norm'), '.3g')}",
                f"tok/s {short(record.get('tokens_per_s'))}",
                f"ETA {duration(self._pace.remaining_s(self._steps - record['step']))}",
                f"imbalance {number(record.get('load_imbalance'), '.2f')}",
            )
        )

    def _step_text(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveView:
    """A panel redrawn in place: progress, losses, rates, where the step's time goes, each layer's load.

    The terminal is taken at the `start` record and given back, with the last frame on it, at `close`.
    """

    def __init__(self, run_name: str, console: Console) -> None:
        self._run_name = run_name
        self._console = console
        self._live: Live | None = None
        self._steps = 0
        self._pace = Pace()
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH * 8)
        self._train: dict[str, Any] = {}
        self._eval: dict[str, Any] = {}
        self._stopped = ""

    def write(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self._steps = record.get("steps") or 0
            self._console.print(Text(banner(self._run_name, record)))
            if self._live is None:
                self._live = Live(
                    console=self._console, get_renderable=self.panel, refresh_per_second=4
                )
                self._live.start()
        elif kind == "train":
            self._train = record
            self._pace.add(record.get("step_ms"))
            if finite(record.get("loss")):
                self._losses.append(record["loss"])
        elif kind == "eval":
            self._eval = record
        elif kind == "mixing":
            self._console.print(Text(f"step {record['step']:,}  {_weights(record)}", "dim"))
        elif kind == "codecs":
            self._console.print(Text(f"step {record['step']:,}  {_codecs(record)}", "dim"))
        elif kind == "checkpoint_failed":
            self._console.print(Text(_WITHOUT_IT.format(**record), "red"))
        elif kind == "anomaly":
            self._console.print(Text(f"step {record['step']:,}  {anomaly_line(record)}", "red"))
        elif kind == "straggler":
            self._console.print(Text(f"step {record['step']:,}  {straggler_line(record)}", "red"))
        elif kind == "goodput":
            self._console.print(Text("\n".join(goodput_lines(record))))
        elif kind == "stop":
            self._stopped = str(record.get("reason", ""))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def panel(self) -> RenderableType:
        """The panel for what was written so far."""
        record = self._train
        if not record:
            return Panel(
                Text("waiting for the first step"), title=self._run_name, border_style="blue"
            )
        lines: list[RenderableType] = [self._progress(record), Text(), self._figures(record)]
        lines += [
            Text(),
            _labelled("loss", sparkline(list(self._losses), _SPARK_WIDTH)),
            _time_split(record),
        ]
        lines += [Text(), *_layer_lines(record.get("expert_load") or [])]
        return Panel(
            Group(*lines),
            title=self._run_name,
            border_style="blue",
            subtitle=f"stopped: {self._stopped}" if self._stopped else None,
        )

    def _progress(self, record: Mapping[str, Any]) -> RenderableType:
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        step = record["step"]
        row.add_row(
            Text(f"step {step:,}/{self._steps:,}", style="bold"),
            ProgressBar(total=max(self._steps, 1), completed=step, complete_style="blue"),
            Text(f"ETA {duration(self._pace.remaining_s(self._steps - step))}", style="bold"),
        )
        return row

    def _figures(self, record: Mapping[str, Any]) -> RenderableType:
        cells = [
            ("loss", number(record.get("loss"), ".4f")),
            ("bits/byte", number(record.get("bits_per_byte"), ".4f")),
            ("val bits/byte", number(self._eval.get("val_bits_per_byte"), ".4f")),
            ("lr", number(record.get("lr"), ".2e")),
            ("grad norm", number(record.get("grad_norm"), ".3g")),
            ("tokens", short(record.get("tokens"))),
            ("tokens/s", short(record.get("tokens_per_s"))),
            ("MFU", number(record.get("mfu"), ".1%")),
            ("step", f"{number(record.get('step_ms'), '.0f')} ms"),
            ("imbalance", number(record.get("load_imbalance"), ".2f")),
            ("worst layer", number(record.get("max_load_imbalance"), ".2f")),
            (
                "dead / dropped",
                f"{short(record.get('dead_experts'))} / {short(record.get('dropped_slots'))}",
            ),
        ]
        grid = Table.grid(expand=True, padding=(0, 1))
        for _ in range(3):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="right", no_wrap=True)
        for start in range(0, len(cells), 3):
            grid.add_row(*(text for cell in cells[start : start + 3] for text in cell))
        return grid


def banner(run_name: str, start: Mapping[str, Any]) -> str:
    """What runs, on what, and which expert backend and why, from a `start` record."""
    reason = start.get("expert_backend_reason")
    lines = [
        ("run", f"{run_name}, {number(start.get('steps'), ',')} steps"),
        (
            "model",
            f"{short(start.get('parameters'))} parameters, {short(start.get('active_parameters'))} active per "
            f"token, {short(start.get('flops_per_token'))} FLOP per token",
        ),
        (
            "ranks",
            f"{start.get('world_size', '-')}{_layout(start)} on "
            f"{start.get('device', '-')}, {start.get('dtype', '-')}, {start.get('backend', '-')}",
        ),
        ("experts", f"{start.get('expert_backend', '-')}" + (f" ({reason})" if reason else "")),
        (
            "peak",
            f"{number(start.get('peak_tflops'), '.3g')} TFLOP/s per rank ({start.get('peak_source', '-')})",
        ),
    ]
    if links := start.get("links"):
        told = (
            f"{kind} nodes {number(links.get(f'{kind}_gbit_per_s'), '.3g')} Gbit/s after "
            f"{number(links.get(f'{kind}_latency_us'), '.3g')} us"
            for kind in ("inside", "between")
            if f"{kind}_gbit_per_s" in links
        )
        lines.append(("links", ", ".join(told)))
    if offload := start.get("offload"):
        rates = (number(offload.get(f"{way}_gbytes_per_s"), ".3g") for way in ("out", "back"))
        lines.append(("offload", "{} GB/s to the host, {} back".format(*rates)))
    if sources := start.get("sources"):
        told = (
            f"{name} {number(of.get('weight'), '.1%')}, {number(of.get('epochs'), '.2f')} epochs"
            for name, of in sources.items()
        )
        lines.append(("sources", "; ".join(told)))
    if start.get("resumed_from_step"):
        lines.append(("resumed", f"from step {start['resumed_from_step']:,}"))
    lines += [("note", str(note)) for note in start.get("notes") or ()]
    return "\n".join(f"{label:>8}  {text}" for label, text in lines)


def _layout(start: Mapping[str, Any]) -> str:
    """The axes along which the ranks differ, e.g. " (pp 2, ep 2)"."""
    axes = [(axis, start.get(axis) or 1) for axis in ("pp", "dp", "cp", "tp", "ep", "etp")]
    told = ", ".join(f"{axis} {degree}" for axis, degree in axes if degree > 1)
    zero = f", zero {start['zero']}" if start.get("zero") else ""
    return f" ({told}{zero})" if told else ""


def _weights(mixing: Mapping[str, Any]) -> str:
    weights = mixing.get("weight_by_source") or {}
    return "weights from here: " + ", ".join(f"{n} {number(w, '.1%')}" for n, w in weights.items())


def _codecs(choice: Mapping[str, Any]) -> str:
    counts = Counter(choice.get("codec_by_layer") or [])
    told = ", ".join(f"{name} in {short(layers)}" for name, layers in counts.most_common())
    return f"codecs from here, by MoE layers: {told or '-'}"


def _by_source(losses: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {number(loss, '.4f')}" for name, loss in losses.items())
    return f"  ({told})" if told else ""


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` averaged into at most `width` blocks, lowest to highest; empty for no values."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high <= low:
        return _BLOCKS[0] * columns
    return "".join(_BLOCKS[round((m - low) / (high - low) * (len(_BLOCKS) - 1))] for m in means)


def load_bar(tokens_E: Sequence[int], width: int) -> str:
    """A layer's tokens per expert as blocks, full height = twice the mean or more, blank = no token.

    More experts than `width` share a column, which shows the largest of them.
    """
    mean = sum(tokens_E) / len(tokens_E) if tokens_E else 0.0
    if mean == 0:
        return ""
    columns = min(width, len(tokens_E))
    edges = [len(tokens_E) * i // columns for i in range(columns + 1)]
    peaks = [max(tokens_E[a:b]) for a, b in itertools.pairwise(edges)]
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, int(p / mean / 2 * top))] if p else " " for p in peaks)


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, spec: str) -> str:
    """`value` in format `spec`, "-" where there is none or it is not finite."""
    return format(value, spec) if finite(value) else "-"


def short(value: Any) -> str:
    """A count in three digits and a suffix (k, M, B, T); "-" where there is none."""
    if not finite(value):
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as `42s`, `3m 05s`, `2h 07m` or `3d 04h`; "-" where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"


def _labelled(label: str, text: str, style: str = "blue") -> Text:
    return Text.assemble((f"{label:<10}", "dim"), (text, style))


def _time_split(record: Mapping[str, Any]) -> Text:
    times = {part: record.get(f"{part}_ms") for part in _PART_COLOURS}
    known = {part: ms for part, ms in times.items() if finite(ms) and ms > 0}
    step_ms, exchange_ms = record.get("step_ms"), record.get("exchange_ms")
    total = max(sum(known.values()), step_ms if finite(step_ms) else 0.0, 1e-9)
    text = _labelled("time", "")
    for part, ms in known.items():
        text.append("█" * round(ms / total * _SPARK_WIDTH), style=_PART_COLOURS[part])
    text.append("\n" + " " * 10)
    for part, ms in known.items():
        text.append(f"{part} {ms / total:.0%}  ", style=_PART_COLOURS[part])
    if finite(exchange_ms) and exchange_ms > 0:
        text.append(f"(exchange, within these, {exchange_ms / total:.0%})", style="dim")
    return text


def _layer_lines(load_LE: Sequence[Sequence[int]]) -> list[Text]:
    ratios = [max(row) * len(row) / sum(row) if sum(row) else 0.0 for row in load_LE]
    shown = sorted(sorted(range(len(ratios)), key=lambda i: -ratios[i])[:_LAYER_LINES])
    lines = []
    for layer in shown:
        style = "red" if ratios[layer] >= 2.0 else "green"
        line = _labelled(f"MoE {layer}", load_bar(load_LE[layer], _SPARK_WIDTH), style)
        lines.append(line.append(f"  {ratios[layer]:.2f}x"))
    if len(shown) < len(ratios):
        lines.append(Text(f"the {len(shown)} most uneven of {len(ratios)} layers", style="dim"))
    return lines
