"""What a job that was asked to stop still has time for. No clock in here."""

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds, of the slowest rank. 0 = not measured yet: then it is tried."""

    elapsed_s: float
    """Since the signal; the end of the step is reached."""
    eval_s: float
    """An evaluation."""
    save_s: float
    """A save, to its end on the disk."""
    saving_s: float
    """Left of the save under way."""


@dataclass(frozen=True, kw_only=True)
class StopPlan:
    """What is done before leaving, and one line about what is not."""

    evaluate: bool
    save: bool
    note: str = ""


def slowest(own: Pace, device: torch.device) -> Pace:
    """The largest of every rank's, the same on all. Collective."""
    seconds = torch.tensor([*asdict(own).values()], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return Pace(**dict(zip(asdict(own), seconds.tolist(), strict=True)))


def plan_stop(grace_s: float, pace: Pace) -> StopPlan:
    """Save if it fits into the grace period, evaluate too if both fit. The save under way is always finished."""
    until_saved_s = pace.elapsed_s + pace.saving_s + pace.save_s
    if pace.save_s and until_saved_s > grace_s:
        return StopPlan(
            evaluate=False,
            save=False,
            note=f"no save: it would end {until_saved_s:.1f} s after the signal ({_parts(pace)}), "
            f"train.grace_s={grace_s:g}. The last checkpoint stays: have the signal sent earlier and raise "
            "train.grace_s, or save more often (checkpoint.every_steps)",
        )
    if pace.eval_s and until_saved_s + pace.eval_s > grace_s:
        return StopPlan(
            evaluate=False,
            save=True,
            note=f"no evaluation: it takes {pace.eval_s:.1f} s and the save would end after train.grace_s={grace_s:g}; "
            "the next start makes it",
        )
    return StopPlan(evaluate=True, save=True)


def must_leave_evaluation(grace_s: float, pace: Pace) -> bool:
    """Whether what is left of the evaluation under way, `pace.eval_s`, and the save behind it do not fit any more.

    A save that was not measured yet gets half of the grace period.
    """
    until_saved_s = pace.elapsed_s + pace.saving_s + (pace.save_s or grace_s / 2)
    return pace.elapsed_s > 0 and until_saved_s + pace.eval_s > grace_s


def _parts(pace: Pace) -> str:
    parts = [f"step {pace.elapsed_s:.1f} s", f"save {pace.save_s:.1f} s"]
    if pace.saving_s:
        parts.insert(1, f"save under way {pace.saving_s:.1f} s")
    return " + ".join(parts)
