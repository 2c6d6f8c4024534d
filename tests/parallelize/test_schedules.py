"""torch's schedules: what they refuse, what they compute, how long their ranks wait, in tables and on clocks."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from moesys.cli import main
from moesys.parallelize.schedules import (
    TORCH_NAMES,
    action_table,
    make_schedule,
    with_torch_first_stage,
)
from moesys.plan.bubble import Action, Durations, one_f_one_b, paper_bubble, walk
from moesys.plan.pipeline import LOOPED, schedule_problems, stages_of_rank, stages_per_rank
from moesys.testing.ranks import run_ranks

EQUAL = Durations()
"""F = I = W."""


def layouts(schedule: str, most_ranks: int = 4) -> Iterator[tuple[int, int]]:
    """(pp, virtual stages), the latter where they matter."""
    for pp in range(1, most_ranks + 1):
        for virtual_stages in (1, 2, 3) if schedule in LOOPED else (1,):
            yield pp, virtual_stages


def test_1f1b_is_torchs_order() -> None:
    for pp in range(1, 6):
        for n in range(pp, pp + 7):
            assert one_f_one_b(pp, n) == action_table("1f1b", pp, 1, n)


@pytest.mark.parametrize("schedule", TORCH_NAMES)
def test_refused_is_what_torch_refuses_and_the_rest_ends(schedule: str) -> None:
    num_refused = 0
    for pp, virtual_stages in layouts(schedule):
        for n in range(1, 13):
            refused = bool(schedule_problems(schedule, pp, virtual_stages, n, num_layers=99))
            num_refused += refused
            if refused:
                with pytest.raises(ValueError, match=r"[Mm]icrobatches"):
                    action_table(schedule, pp, virtual_stages, n)
                continue
            table = action_table(schedule, pp, virtual_stages, n)
            walk(table, EQUAL)  # raises if ranks wait for ever
            for rank, actions in enumerate(table):
                stages = stages_of_rank(schedule, rank, pp, virtual_stages)
                done = [part for action in actions for part in parts(action)]
                assert sorted(done) == sorted(
                    Action(kind, stage, micro_batch)
                    for kind in ("F", "I", "W")
                    for stage in stages
                    for micro_batch in range(n)
                )
    assert (num_refused == 0) == (schedule in ("gpipe", "zbv"))


def parts(action: Action) -> list[Action]:
    kinds = ("I", "W") if action.kind == "B" else (action.kind,)
    return [action._replace(kind=kind, sent_after=0) for kind in kinds]


DURATIONS = [EQUAL, Durations(forward=2.0, input_gradient=3.0, weight_gradient=2.0)]


@pytest.mark.parametrize("durations", DURATIONS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble"])
def test_the_table_has_the_bubble_of_the_paper(schedule: str, durations: Durations) -> None:
    for pp, virtual_stages in layouts(schedule, 5):
        for n in (pp, 2 * pp, 16, 24):
            if not schedule_problems(schedule, pp, virtual_stages, n, num_layers=99):
                counted = walk(action_table(schedule, pp, virtual_stages, n), durations)
                says = paper_bubble(schedule, pp, virtual_stages, n, durations)
                assert counted.bubble_time == pytest.approx(says), (pp, virtual_stages, n)


def test_interleaved_with_fewer_micro_batches_than_ranks() -> None:
    for pp, virtual_stages in layouts("interleaved"):
        for n in range(1, pp):
            counted = walk(action_table("interleaved", pp, virtual_stages, n), EQUAL)
            says = paper_bubble("interleaved", pp, virtual_stages, n, EQUAL)
            assert counted.bubble_time == pytest.approx(says), (pp, virtual_stages, n)


def test_zbv_waits_only_before_a_ranks_first_action_and_after_its_last() -> None:
    """The paper's zero counts each rank from its first action; a step also has the (p - 1) F until the last rank starts."""
    for pp in (2, 3, 4, 8):
        for n in (2 * pp - 1, 2 * pp, 32):
            timeline = walk(action_table("zbv", pp, 2, n), EQUAL)
            for rank, spans in enumerate(timeline.spans_of_rank):
                inside = spans[-1].end - spans[0].start - timeline.busy_of_rank[rank]
                assert inside == paper_bubble("zbv", pp, 2, n, EQUAL) == 0.0
            assert timeline.bubble_time == pp - 1
        few = walk(action_table("zbv", pp, 2, pp), EQUAL)
        assert few.bubble_time == 2 * (pp - 1)


@pytest.mark.parametrize(
    "durations", [EQUAL, Durations(forward=2.0, input_gradient=2.0, weight_gradient=1.0)]
)
def test_dualpipev_has_the_bubble_of_its_formula(durations: Durations) -> None:
    """With F&B = F + B: torch runs a pair one after the other and then sends both results."""
    for pp in (1, 2, 3, 4, 8):
        for n in (2 * pp, 2 * pp + 3, 32):
            table = action_table("dualpipev", pp, 2, n)
            counted = walk(table, durations).bubble_time
            assert counted == paper_bubble("dualpipev", pp, 2, n, durations)
            if pp > 1:
                at_once = [[action._replace(sent_after=0) for action in row] for row in table]
                assert walk(at_once, durations).bubble_time < counted


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "pipeline", "--formulas"]) == 0
    page = Path(__file__).parents[2] / "docs" / "pipeline.md"
    assert capsys.readouterr().out in page.read_text()


def test_the_command_shows_stages_and_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["experiment=quickstart", "parallel.ep=1", "parallel.pp=2", "model.num_layers=8"]
    assert main(["config", "pipeline", *options, "train.global_batch_tokens=8192", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["world_size"], facts["num_micro_batches"], facts["num_stages"]) == (2, 4, 2)
    layers = [layer for rank in facts["ranks"] for of_stage in rank["layers"] for layer in of_stage]
    assert layers == list(range(8))
    assert sum(rank["cost_share"] for rank in facts["ranks"]) == pytest.approx(1)
    assert facts["bubble_of_even_stages"] == pytest.approx(1 / 5)
    assert facts["bubble"] >= facts["bubble_of_even_stages"]

    assert main(["config", "pipeline", *options, "train.global_batch_tokens=8192"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [re.findall(r"[FB]\d", row) for row in rows] == [
        ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"],
        ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"],
    ]


# --- On clocks: stages that sleep, so that ranks need no core of their own

UNIT_S = 0.1
"""Of a forward of all of a rank's stages, and of each half of the backward."""


Log = list[tuple[Action, float, float]]
"""What a rank did, from when to when."""


class _Sleep(torch.autograd.Function):
    """The identity; sleeps and notes it forwards (if its kind is known there) and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "SleepingStage", micro_batch: int, kind: str) -> Tensor:
        ctx.note = (stage, micro_batch, kind)
        if kind == "I":
            stage.sleep("F", micro_batch)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        stage, micro_batch, kind = ctx.note
        stage.sleep(kind, micro_batch)
        return grad.clone(), None, None, None


class SleepingStage(nn.Module):
    """Hands on x + 0, whose value is the micro-batch's number."""

    def __init__(self, stage: int, seconds: float, log: Log) -> None:
        super().__init__()
        self.stage, self.seconds, self.log = stage, seconds, log
        self.embedding = nn.Parameter(torch.zeros(1)) if stage == 0 else None
        self.weight = nn.Parameter(torch.zeros(1))

    def sleep(self, kind: Any, micro_batch: int) -> None:
        start = time.monotonic()  # one clock for all processes of a machine
        time.sleep(self.seconds)
        self.log.append((Action(kind, self.stage, micro_batch), start, time.monotonic()))

    def forward(self, x_B1: Tensor) -> Tensor:
        micro_batch = round(x_B1[0, 0].item())
        weight = _Sleep.apply(self.weight, self, micro_batch, "W")
        x_B1 = x_B1 if self.embedding is None else x_B1 + self.embedding
        return _Sleep.apply(x_B1, self, micro_batch, "I") + weight


def run_schedules(rank: int, world_size: int, n: int) -> dict[str, Any]:
    """Per schedule, this rank's logs of two steps."""
    logs: dict[str, Any] = {}
    for schedule in TORCH_NAMES:
        log: Log = []
        num_stages = world_size * stages_per_rank(schedule, 2)
        meta = torch.empty(1, 1, device="meta", requires_grad=True)
        modules = {
            stage: SleepingStage(stage, 0.0, log)
            for stage in stages_of_rank(schedule, rank, world_size, 2)
        }
        stages = [
            PipelineStage(
                module,
                *(stage, num_stages, torch.device("cpu")),
                input_args=(meta if stage else torch.empty(1, 1, device="meta"),),
                output_args=(meta,),
            )
            for stage, module in modules.items()
        ]
        made = make_schedule(schedule, stages, n, lambda output, target: output.sum())
        x_N1 = torch.arange(n, dtype=torch.float32)[:, None]
        logs[schedule] = []
        seconds = UNIT_S * world_size / num_stages
        for step_seconds in (0.0, seconds, seconds):  # the first step connects
            log.clear()
            for module in modules.values():
                module.seconds = step_seconds
            torch.distributed.barrier()
            made.step(
                *([x_N1] if 0 in modules else []),
                target=x_N1 if num_stages - 1 in modules else None,
                return_outputs=False,
            )
            if step_seconds:
                logs[schedule].append(list(log))
    return logs


@pytest.mark.parity  # a figure of clocks: two minutes of a quiet machine
@pytest.mark.parametrize("pp", [2, 4])
def test_ranks_wait_as_long_as_the_table_says(pp: int) -> None:
    """The shorter of two steps within 15 % of the table's, the idle share within 0.08.

    What the schedule itself takes counts as idle here, as does what a loaded machine makes of it.
    """
    n = 2 * pp
    logs = run_ranks(run_schedules, pp, n)
    for schedule in TORCH_NAMES:
        table = action_table(schedule, pp, 2, n)
        steps = list(zip(*(log[schedule] for log in logs), strict=True))
        for log_of_rank in steps:
            for log, actions in zip(log_of_rank, table, strict=True):
                assert as_pieces(action for action, _, _ in log) == as_pieces(actions)

        log_of_rank = min(steps, key=seconds_of)
        step_s = seconds_of(log_of_rank)
        slept = [end - start for log in log_of_rank for _, start, end in log]
        mean = sum(slept) / len(slept)
        each = Durations(forward=mean, input_gradient=mean, weight_gradient=mean)
        says = walk(table, with_torch_first_stage(each, table))
        bubble = 1 - sum(slept) / pp / step_s
        print(
            f"{schedule:24} pp {pp}: step {step_s:.3f} s, the table {says.makespan:.3f} s; "
            f"idle {bubble:.3f}, the table {says.bubble:.3f}"
        )
        assert 0.99 < step_s / says.makespan < 1.15, schedule
        assert abs(bubble - says.bubble) < 0.08, schedule


def seconds_of(log_of_rank: Sequence[Log]) -> float:
    """From the first start to the last end on any rank."""
    starts = [start for log in log_of_rank for _, start, _ in log]
    return max(end for log in log_of_rank for _, _, end in log) - min(starts)


def as_pieces(actions: Iterable[Action]) -> list[tuple[Any, ...]]:
    """In order, a whole backward as its parts; without stage 0's I, which torch computes with its W."""
    return [
        (part.kind, part.stage, part.micro_batch)
        for action in actions
        for part in parts(action)
        if (part.kind, part.stage) != ("I", 0)
    ]
