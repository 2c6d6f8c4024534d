"""A training job from its overrides to its exit code: compose, check, join, train."""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from moesys.config.compose import compose, load_resolved, to_yaml
from moesys.config.elastic import fit_to_world
from moesys.config.schema import RunConfig
from moesys.config.validate import check
from moesys.launch.status import State
from moesys.models.transformer import Transformer
from moesys.moe.contract import check_run_config
from moesys.parallel.bootstrap import process_group
from moesys.parallel.flight import record_flights
from moesys.parallel.measured import addresses_in
from moesys.parallel.surroundings import place_here
from moesys.train.agent import find_agent
from moesys.train.exit_codes import DONE_EXIT_CODE, STOPPED_EXIT_CODE
from moesys.train.patience import LONGEST_S
from moesys.train.setup import build_run
from moesys.train.signals import StopRequest
from moesys.train.start_up import begin_start_up
from moesys.train.trainer import Trainer
from moesys.train.turn import Turn, turn_to_write
from moesys.train.watch import Watch

BACKEND_EXTRA_S = 10.0
"""Until a backend's own timeout ends a collective that the watch could not."""


def main(
    overrides: Sequence[str],
    config_dir: Path | None = None,
    resolved: Path | None = None,
    prepare: Callable[[Trainer], None] | None = None,
    composed: RunConfig | None = None,
) -> int:
    """Run `moesys train` on this rank; return the exit code. Raises ValueError for a wrong configuration.

    `resolved` is a whole configuration, as a run folder has it, whose keys overrides set; `composed` is what all
    that makes, if it is known. `prepare` gets this rank's trainer before it trains.
    """
    agent = find_agent(os.environ)
    if agent is not None:
        agent.at_its_end(signal.SIGKILL)
    start_up = begin_start_up(os.environ)
    config = composed or (
        load_resolved(resolved, overrides) if resolved else compose(overrides, config_dir)
    )
    place, measured = place_here(os.environ), addresses_in(os.environ)
    config, told = fit_to_world(config, place.world_size)
    warnings = told + check(config, place.world_size, place.ranks_per_node)
    with torch.device("meta"):  # what only a constructor can refuse is refused before ranks meet
        Transformer(config.model)
    check_run_config(config)
    longest_s = config.train.timeout_s or LONGEST_S
    record_flights()
    start_up.mark("configuration")
    # The watch gives up first and says more than a backend does.
    with (
        StopRequest() as stop,
        process_group(
            config.train.device,
            longest_s + BACKEND_EXTRA_S,
            config.train.start_timeout_s,
            place,
            settings=to_yaml(config),
            measured=measured,
        ) as process,
        Watch(process, config.train.timeout_s, agent) as watch,
    ):
        start_up.mark("rendezvous")
        is_writer = process.rank == 0
        if is_writer:
            for warning in warnings:
                print(f"warning: {warning}", flush=True)
        folder = Path(config.run.dir)
        with turn_to_write(folder, watch.explain) if is_writer else nullcontext() as turn:
            if turn is not None:
                stop.before_leaving = lambda: turn.say("requeued", "stopped before its first step")
            run = build_run(config, process, start_up.mark)
            trainer = Trainer(run, turn and turn.check, start_up)
            watch.step, trainer.explain = lambda: trainer.step, watch.explain
            watch.limit_s = lambda: trainer.patience_s
            trainer.is_hang = watch.is_hang
            if turn is not None:
                watch.on_leave = lambda reason: _leave(trainer, turn, reason)
            if prepare is not None:
                prepare(trainer)
            status = trainer.train(stop)
            if turn is not None:
                turn.say(*_status(status, stop, trainer.step))
        dist.barrier()  # a rank that fails at its very end is still watched
    return DONE_EXIT_CODE if status == "done" else STOPPED_EXIT_CODE


def _status(status: str, stop: StopRequest, step: int) -> tuple[State, str]:
    if status == "done":
        return "done", ""
    signal = stop.requested.name if stop.requested else "a signal to another rank"
    return "requeued", f"stopped by {signal} at step {step}"


def _leave(trainer: Trainer, turn: Turn, reason: str) -> None:
    trainer.record_failure(reason)
    turn.say_failed(reason)
