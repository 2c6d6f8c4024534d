"""Which codec and wire each MoE layer takes, decided once in a run: when, from what, and kept for a resume."""

import time
from typing import Any

from moesys.config.build import config_hash
from moesys.moe.compression import UNCOMPRESSED
from moesys.plan.codec_choice import Trial, within_bytes, within_error
from moesys.train.evaluate import try_candidates
from moesys.train.setup import Run

NONE = "none"
"""The name of leaving rows as they are, which every layer may."""


class CodecChoice:
    """Of one run, on every rank."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._config = run.config.dispatch
        has_rows = run.config.parallel.ep > 1 and bool(run.config.model.moe_layers)
        self._is_due = bool(self._config.candidates) and has_rows
        self._names = [NONE, *self._config.candidates]
        self._made: list[str] = []
        """Of each MoE layer; [] before."""

    @property
    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; None before there is a choice."""
        if not self._made:
            return None
        return {"by_layer": self._made, "of": config_hash(self._config)}

    def at_resume(self, state: dict[str, Any] | None) -> None:
        """Keep what was chosen, if it was from the same candidates by the same budgets."""
        if state is not None and self._is_due and state["of"] == config_hash(self._config):
            self._take(state["by_layer"])

    def rewind(self, state: dict[str, Any] | None) -> None:
        """As a resume from a checkpoint of this run would have it: chosen, or due again."""
        if self._made:
            self._made, self._is_due = [], True
            for layer in self._run.model.moe_layers():
                layer.compression = UNCOMPRESSED
        self.at_resume(state)

    def before(self, step: int) -> dict[str, Any] | None:
        """Collective, and the same on all ranks: choose, where that is due before `step`; the record of it.

        Decided before a step, as mixing is: a run that stopped in between finds it due again, from the same model.
        """
        if not self._is_due or step <= self._config.warmup_steps:
            return None
        began = time.perf_counter()
        run, config = self._run, self._config
        batches = next(iter(run.eval_batches.values()))
        train = run.config.train
        trials_MX = try_candidates(
            run.parallel,
            batches,
            len(config.candidates),
            train.dtype,
            run.meshes,
            forwards=train.exchanging_forwards,
        )
        if config.error_budget is not None:
            taken_M = within_error(trials_MX, config.error_budget)
        else:
            assert config.byte_budget is not None, "one budget is given"
            taken_M = within_bytes(trials_MX, config.byte_budget)
        self._take([self._names[x] for x in taken_M])
        columns = map(_columns, zip(*trials_MX, strict=True))
        return {
            "kind": "codecs",
            "step": step,
            "codec_by_layer": self._made,
            "trials": dict(zip(self._names, columns, strict=True)),
            "codecs_ms": (time.perf_counter() - began) * 1e3,
        }

    def _take(self, by_layer: list[str]) -> None:
        """Layers that no evaluation runs do as the last that it does."""
        self._made, self._is_due = by_layer, False
        for at, layer in self._run.model.moe_places().items():
            name = by_layer[min(at, len(by_layer) - 1)]
            layer.compression = UNCOMPRESSED if name == NONE else layer.candidates[name]


def _columns(trials_M: tuple[Trial, ...]) -> dict[str, list[float]]:
    return {
        "error_by_layer": [trial.error for trial in trials_M],
        "sent_bytes_by_layer": [trial.sent_bytes for trial in trials_M],
        "ms_by_layer": [trial.ms for trial in trials_M],
    }
