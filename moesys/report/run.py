"""A run folder in bounded memory: what the page and `--json` are made of.

Shapes: S bins of steps.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesys.report.binned import Binned
from moesys.report.expert_values import ExpertBins, ExpertValues, as_wide, over_mean
from moesys.report.goodput import Books, Ledger
from moesys.report.records import expert_stride_for, read_records, time_of
from moesys.report.source_columns import SourceColumns

PARTS = ("data", "forward", "backward", "optimizer")
"""Where a step's time goes, in its order; `<part>_ms` of a train record. They do not overlap, and
`exchange_ms` is part of forward and backward."""

COLUMNS = (
    "step", "tokens", "loss", "bits_per_byte", "aux_loss", "z_loss", "mtp_loss", "lr", "grad_norm", "tokens_per_s",
    "tflops_per_rank", "mfu", "load_imbalance", "max_load_imbalance", "dead_experts", "dropped_slots",
    "router_entropy",
    "sent_bytes", "between_nodes_bytes", "codec_rows", "compression_ratio", "step_ms", "exchange_ms",
    *(f"{part}_ms" for part in PARTS),
    "sequences", "micro_steps", "planned_ms", "planned_idle", "planned_keys_wait", "ring_bytes",
    "rank_imbalance", "owner_imbalance", "load_prediction_error", "copies_bytes", "copies_between_nodes_bytes",
    "copies_wait_ms", "added_copies", "moved_experts", "reshard_bytes",
)  # fmt: skip
"""The numbers kept of each train record."""

EVAL_COLUMNS = (
    *("step", "val_loss", "val_bits_per_byte", "eval_ms"),
    *("expert_similarity", "source_divergence", "codec_error"),
)

_CURVE_BINS = 800
_EVAL_BINS = 400
_EXPERT_SAMPLES = 1200
_CHECKPOINTS_KEPT = 10
_ANOMALIES_KEPT = 100


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says, ready to draw."""

    folder: Path
    name: str
    starts: list[dict[str, Any]]
    stops: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """Starts, stops and the newest checkpoints and anomalies in the order in which they happened."""
    num_checkpoints: int
    num_anomalies: int
    num_evals: int
    train: Binned
    """Rows of COLUMNS."""
    evals: Binned
    """Rows of EVAL_COLUMNS."""
    loss_by_source: SourceColumns
    """Held-out."""
    weight_by_source: SourceColumns
    last_train: dict[str, Any]
    """Empty before the first step."""
    last_eval: dict[str, Any]
    num_steps: int
    """Train records; fewer than steps where not every step is logged."""
    totals: dict[str, float]
    """Exact sums over all records: of a train column by its name, and eval_ms, checkpoint_ms."""
    peaks: dict[str, tuple[float, int]]
    """Largest value of a column, and its step."""
    seconds: float
    """From each start to the last record before the next one, summed."""
    last_unix_s: float | None
    ledger: Ledger
    """Where its wall time went."""
    codec_choice: dict[str, Any]
    """The last one of the layers' codecs; empty where none was made."""
    stragglers: list[dict[str, Any]]
    """Ranks that were slower than the others, as their records say."""
    ended: bool
    """The last word of metrics.jsonl is a stop."""
    loads: ExpertValues | None
    """Tokens of each expert over the mean of its layer."""
    holders: ExpertValues | None
    """Ranks of a group of parallel.ep that held each expert; None where none had copies planned before the step."""
    summary: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]

    def column(self, name: str) -> NDArray[np.float64]:
        """Mean of a train column per bin, float64 [S], NaN where absent."""
        return self.train.mean[:, COLUMNS.index(name)]

    def eval_column(self, name: str) -> NDArray[np.float64]:
        """Mean of an eval column per bin, float64."""
        return self.evals.mean[:, EVAL_COLUMNS.index(name)]


def read_run(folder: str | Path) -> Run:
    """Read RUN's metrics.jsonl and, where present, config.yaml, summary.json and data_manifest.json.

    Raises:
        ValueError: not a run folder, or one of its files cannot be read; names the file.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: {path} is missing. Give the folder named by run.dir, in which "
            "`moesys train` writes metrics.jsonl."
        )
    reading = _Reading()
    stride = expert_stride_for(path, samples=_EXPERT_SAMPLES)
    for record in read_records(path, expert_stride=stride):
        reading.add(record)
    config = _yaml(folder / "config.yaml")
    section = config.get("run")
    return Run(
        folder=folder,
        name=str(section.get("name") or folder.name) if isinstance(section, dict) else folder.name,
        starts=reading.starts,
        stops=reading.stops,
        events=reading.events,
        num_checkpoints=reading.num_checkpoints,
        num_anomalies=reading.num_anomalies,
        num_evals=reading.num_evals,
        train=reading.train,
        evals=reading.evals,
        loss_by_source=reading.loss_by_source,
        weight_by_source=reading.weight_by_source,
        last_train=reading.last_train,
        last_eval=reading.last_eval,
        num_steps=reading.num_steps,
        totals=reading.totals,
        peaks=reading.peaks,
        seconds=reading.seconds,
        last_unix_s=reading.unix_s,
        ledger=reading.books.ledger(),
        codec_choice=reading.codec_choice,
        stragglers=reading.stragglers,
        ended=reading.last_kind == "stop",
        loads=reading.loads.values(stride),
        holders=reading.holders.values(stride),
        summary=_json(folder / "summary.json"),
        manifest=_json(folder / "data_manifest.json"),
        config=config,
    )


class _Reading:
    """What is kept while the records go by."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.stops: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.num_checkpoints = 0
        self.num_anomalies = 0
        self.num_evals = 0
        self.train = Binned((len(COLUMNS),), _CURVE_BINS)
        self.evals = Binned((len(EVAL_COLUMNS),), _EVAL_BINS)
        self.loss_by_source = SourceColumns("val_loss_by_source")
        self.weight_by_source = SourceColumns("weight_by_source")
        self.last_train: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self.codec_choice: dict[str, Any] = {}
        self.num_steps = 0
        self.totals: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, tuple[float, int]] = {}
        self.seconds = 0.0
        self.unix_s: float | None = None
        self.last_kind = ""
        self.books = Books()
        self.stragglers: list[dict[str, Any]] = []
        self.loads, self.holders = ExpertBins(), ExpertBins()

    def add(self, record: dict[str, Any]) -> None:
        kind = self.last_kind = record["kind"]
        self._clock(record)
        self.books.add(record)
        if kind == "train":
            self._add_train(record)
        elif kind == "eval":
            self.num_evals += 1
            self._add_total(record, "eval_ms")
            self.last_eval = record
            self.evals.add(_row(record, EVAL_COLUMNS))
            self.loss_by_source.add(record)
        elif kind == "checkpoint":
            self.num_checkpoints += 1
            self._add_total(record, "checkpoint_ms")
            self._keep_newest(record, self.num_checkpoints > _CHECKPOINTS_KEPT)
        elif kind == "anomaly":
            self.num_anomalies += 1
            self._keep_newest(record, self.num_anomalies > _ANOMALIES_KEPT)
        elif kind == "start":
            self.starts.append(record)
            self.events.append(record)
        elif kind == "stop":
            self.stops.append(record)
            self.events.append(record)
        elif kind == "straggler":
            self.stragglers.append(record)
        elif kind == "codecs":
            self.codec_choice = record

    def _keep_newest(self, event: dict[str, Any], instead_of_oldest: bool) -> None:
        if instead_of_oldest:
            self.events.remove(next(old for old in self.events if old["kind"] == event["kind"]))
        self.events.append(event)

    def _add_train(self, record: dict[str, Any]) -> None:
        load, holders = record.pop("expert_load", None), record.pop("expert_holders", None)
        self.last_train = record
        self.num_steps += 1
        row = _row(record, COLUMNS)
        self.train.add(row)
        self.weight_by_source.add(record)
        for name in COLUMNS:
            self._add_total(record, name)
        for name in ("load_imbalance", "max_load_imbalance", "tokens_per_s", "step_ms"):
            value = row[COLUMNS.index(name)]
            if value > self.peaks.get(name, (-np.inf, 0))[0]:
                self.peaks[name] = (float(value), record["step"])
        if load:
            self.loads.add(record["step"], over_mean(as_wide(load)))
        if holders:
            self.holders.add(record["step"], as_wide(holders))

    def _add_total(self, record: dict[str, Any], name: str) -> None:
        value = record.get(name)
        self.totals[name] += value if isinstance(value, int | float) else 0.0

    def _clock(self, record: dict[str, Any]) -> None:
        now = time_of(record)
        if now is None:
            return
        if record["kind"] != "start" and self.unix_s is not None:
            self.seconds += max(0.0, now - self.unix_s)
        self.unix_s = now


def _row(record: dict[str, Any], columns: tuple[str, ...]) -> NDArray[np.float64]:
    values = (record.get(name) for name in columns)
    return np.array(
        [value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it to report without it.") from None
    return _mapping(value, path)


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error}); remove it to report without it.") from None
    return _mapping(value or {}, path)


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: must be a mapping of names to values, not a {type(value).__name__}."
        )
    return value
