"""What fewer bytes between ranks cost in loss, and gain in time where the network is slow.

Parts, each kept when others are measured: `ratio` and `loss` are sweeps (quality.py), kept in runs/compression.sweep and
runs/compression_loss.sweep; `speed` runs on an emulated cluster (speed.py) and needs root, as `moesys-fabric` does.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compression.picture import picture
from benchmarks.compression.quality import (
    LOSS_WORDS,
    PLAIN,
    RATIO_WORDS,
    loss_rows,
    ratio_rows,
    train_all,
)
from benchmarks.compression.speed import Case, speed_rows
from benchmarks.results import ROOT, Cell, Result, rows_of_other_parts
from benchmarks.shaping import STAYING
from benchmarks.swept import kept_folder, run_folders, sweep, variants_of

DESCRIPTION = "loss over the rows that travel; step time by codec and exchange where plain rows take 45 % and 70 % of a step"
RESULT = "compression"
SEEDS = 3
CODEC = "codec, error bound"
PARTS = {"ratio": [CODEC], "loss": ["trained with"], "speed": ["model", "layer"]}
"""And the first columns of their rows."""
SHARES = (45, 70)
"""Of a plain step, in percent, that exchanges of rows take: the mean and the worst of 2411.08446."""
GAP_PCT = 0.3
"""By which a loss may be above the plain one."""
LOSS_VARIANTS = {
    name: [f"codec={name}"]
    for name in (PLAIN, "int8", "int4", "fp8", "lsh", "lsh_int8", "lsh_int4", "tree_int4")
}
SURE = (PLAIN, "int4", "tree_int4")
"""Of these with twice the seeds: whatever changes a step moves a seed's loss by up to a percent."""
LINES = {"tree": "tree", "lsh": "slope", "lsh without slopes": "none"}
"""Of the picture: which rows there are, and what the names of such variants begin with."""
POINTS = ("int8", "int4", "lsh_int4, 0.35", "tree_int4, 0.3")
PICTURE = ROOT / "docs" / "compression_compared.svg"

SPEED_WORDS = [
    *("experiment=quickstart", "parallel.ep=8", "train.global_batch_tokens=16384", "optim.lr=1e-4"),
    *("checkpoint.every_steps=0", "model.moe.expert_backend=loop", "schedule.warmup_steps=1"),
]
WIDE = ["model.d_model=512", "model.moe.d_expert=384", "model.d_ffn=2048", "model.num_layers=3"]
WIDE_VARIANTS = (PLAIN, STAYING, "int8", "int4", "lsh_int4", "tree_int4", "hierarchical tree_int4")
WIDE_SHARES = SHARES[:1]
"""Its gradients take so long on slower uplinks that rows never take 70 %."""
WIDE_STEPS = 80
QUICK_TRAINED = ["train.steps=4", "train.eval_tokens=4096", "schedule.warmup_steps=2"]
QUICK_SHARES = (20,)
QUICK_SPEED = [
    "model.num_layers=2",
    "train.global_batch_tokens=2048",
    "train.micro_batch_tokens=256",
]


def run(
    quick: bool,
    progress: Callable[[str], None],
    seeds: int = SEEDS,
    only: Sequence[str] = tuple(PARTS),
) -> Result:
    """About four hours on two cores, of which `ratio` takes one and `loss` one and a half; quick: a few steps of some.

    With `only` some parts, the rows of the others are those of the result that is there.
    """
    seeds = 1 if quick else seeds
    rows, sources = rows_of_other_parts(RESULT, PARTS, only, quick)
    is_whole = seeds >= SEEDS and not quick
    with tempfile.TemporaryDirectory() as scratch:
        if "ratio" in only:
            rows += _ratio(quick, seeds, Path(scratch), progress)
        if "loss" in only:
            rows += _loss(quick, seeds, Path(scratch), progress)
    if "speed" in only:
        rows += _speed(quick, progress)
    if is_whole and "ratio" in only:
        _draw(rows)
    return Result(headline=headlines(rows), rows=rows, is_whole=is_whole, sources=sources)


def headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of what is there; speedups, bytes and loss of one of quickstart's variants. Pure."""
    found: dict[str, float] = {}
    at = {row["trained with"]: row for row in rows if "trained with" in row}
    best = best_variant(rows, at)
    staying = {
        (row["model"], row["exchange_pct"]): row for row in rows if row.get("variant") == STAYING
    }
    for row in best:
        of_step = at_its_share(row, staying[row["model"], row["exchange_pct"]])
        speedup = of_step / steps_ratio(row, at)
        found[f"speedup_at_{row['exchange_pct']}pct"] = round(speedup, 3)
        found[f"reached_at_{row['exchange_pct']}pct"] = row["reached_pct"]
    if best:
        found["uplink_bytes_pct"] = max(row["uplink_bytes_pct"] for row in best)
        costs = [row["codec_cost_pct"] for row in best if row["codec_cost_pct"] is not None]
        if costs:
            found["codec_cost_pct"] = max(costs)
        if run := at.get(trained_as(best[0]["variant"])):
            found["val_loss_gap_pct"] = run["gap_pct"]
    layers = [row for row in rows if row.get("of_model") == "quickstart"]
    if best and layers:
        least = min(row["exchange_pct"] for row in layers)
        over = {
            row["layer"]: row["speedup_over_deepspeed"]
            for row in layers
            if row["exchange_pct"] == least
        }
        if (name := trained_as(best[0]["variant"])) in over:
            found["speedup_over_deepspeed"] = over[name]
        found["plain_over_deepspeed"] = over[PLAIN]
    if not best:
        smaller = {row[CODEC]: row for row in rows if CODEC in row}
        if row := at.get("tree_int4") or smaller.get("tree_int4, 0.3"):
            found["val_loss_gap_pct"] = row["gap_pct"]
    return found


def best_variant(
    rows: Sequence[Mapping[str, Any]], at: Mapping[str, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The rows, by rising share, of quickstart's variant that is fastest over all shares together, to the same loss where that is
    known, among those whose loss is near the plain one's. Pure."""
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(
        (row for row in rows if row.get("model") == "quickstart"),
        key=lambda row: row["exchange_pct"],
    ):
        run = at.get(trained_as(row["variant"]))
        if row["variant"] != STAYING and (run is None or run["gap_pct"] <= GAP_PCT):
            by_variant.setdefault(row["variant"], []).append(row)
    speeds = {
        name: math.prod(speedup_to_loss(row, at) for row in own) for name, own in by_variant.items()
    }
    return by_variant[max(speeds, key=speeds.__getitem__)] if speeds else []


def speedup_to_loss(row: Mapping[str, Any], at: Mapping[str, Mapping[str, Any]]) -> float:
    """Of a row of `speed`: of time to the same loss, with the steps that `at` says; of a step, if it does not. Pure."""
    return row["step_speedup"] / steps_ratio(row, at)


def steps_ratio(row: Mapping[str, Any], at: Mapping[str, Mapping[str, Any]]) -> float:
    """How many times the plain run's steps its variant takes to the same loss; 1 where that is not known, or fewer: a better loss of
    a few seeds is no speed. Pure."""
    trained = at.get(trained_as(row["variant"]))
    return max(1.0, trained["steps_ratio"]) if trained else 1.0


def at_its_share(row: Mapping[str, Any], staying: Mapping[str, Any]) -> float:
    """A step's speedup were the share of exchanges of rows just that which was wanted, if of these as much is left as was
    measured, at the share that was reached. Pure."""
    share, staying_part = row["exchange_pct"] / 100, 1 / staying["step_speedup"]
    left = (1 / row["step_speedup"] - staying_part) / (1 - staying_part)
    return 1 / (1 - share + share * left)


def trained_as(variant: str) -> str:
    """Whose losses it has: an exchange changes them by rounding alone."""
    words = [word for word in variant.split() if word not in ("hierarchical", "deduplicated")]
    return " ".join(words) or PLAIN


def _ratio(
    quick: bool, seeds: int, scratch: Path, progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    variants, words, folder = variants_of("compression"), RATIO_WORDS, kept_folder("compression")
    if quick:
        variants = {name: variants[name] for name in (PLAIN, *POINTS)}
        words, folder = [*words, *QUICK_TRAINED], scratch / "compression.sweep"
    return ratio_rows(train_all(variants, words, seeds, folder, progress))


def _loss(
    quick: bool, seeds: int, scratch: Path, progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    variants, words, folder = LOSS_VARIANTS, LOSS_WORDS, kept_folder("compression_loss")
    if quick:
        variants = {name: variants[name] for name in (PLAIN, "int8")}
        words = [*words, *QUICK_TRAINED, "train.eval_every_steps=2"]
        folder = scratch / "compression_loss.sweep"
    found = train_all(variants, words, seeds, folder, progress)
    if not quick:
        sure = {name: variants[name] for name in SURE}
        found |= train_all(sure, words, 2 * seeds, folder, progress)
    return loss_rows(found)


def _speed(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    if quick:
        case = Case(
            model="quickstart",
            words=[*SPEED_WORDS, *QUICK_SPEED],
            shares_pct=QUICK_SHARES,
            names=(PLAIN, STAYING, "lsh_int8"),
            rounds=1,
            tries=1,
        )
        return speed_rows(case, progress)
    weights = _weights(LOSS_WORDS, kept_folder("compression_loss"), progress)
    narrow = Case(
        model="quickstart",
        words=[*SPEED_WORDS, f"checkpoint.init_from={weights}"],
        shares_pct=SHARES,
    )
    words = [*LOSS_WORDS, *WIDE, f"train.steps={WIDE_STEPS}"]
    weights = _weights(words, kept_folder("compression_wide"), progress)
    wide = Case(
        model="wider",
        words=[*SPEED_WORDS, *WIDE, f"checkpoint.init_from={weights}"],
        shares_pct=WIDE_SHARES,
        names=WIDE_VARIANTS,
    )
    return [row for case in (narrow, wide) for row in speed_rows(case, progress)]


def _weights(words: Sequence[str], folder: Path, progress: Callable[[str], None]) -> Path:
    """Of a plain run, trained if it was not yet."""
    variants = {PLAIN: LOSS_VARIANTS[PLAIN]}
    sweep(variants, words, 1, folder, progress)
    return run_folders(variants, 1, folder)[PLAIN][0]


def _draw(rows: Sequence[Mapping[str, Any]]) -> None:
    of = {row[CODEC]: row for row in rows if CODEC in row}
    lines = {
        title: [row for name, row in of.items() if name.startswith(f"{kind}, ")]
        for title, kind in LINES.items()
    }
    points = {name: of[name] for name in POINTS}
    PICTURE.write_text(picture(lines, points, "validation loss over the share of rows that travel"))
