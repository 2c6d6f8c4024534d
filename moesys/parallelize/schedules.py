"""The schedules of torch.distributed.pipelining: by name, and what they compute in which order, without any process.

A table is recorded, not read: a schedule runs one step over stages that only note what they are asked. (The order that
1F1B says of its last stage, `pipeline_order`, is not the one it runs.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.pipelining.schedules import get_schedule_class

from moesys.plan.bubble import Action, Durations, Table
from moesys.plan.pipeline import LOOPED, V_SHAPED, stages_of_rank, stages_per_rank

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


def make_schedule(
    name: str, stages: Sequence[Any], num_micro_batches: int, loss_function: Callable[..., Any]
) -> Any:
    """torch's schedule over the stages of this rank. Raises ValueError where plan.pipeline.schedule_problems warns."""
    several = name in LOOPED | V_SHAPED
    return get_schedule_class(TORCH_NAMES[name])(
        list(stages) if several else stages[0],
        num_micro_batches,
        loss_fn=loss_function,
        scale_grads=False,
    )


def action_table(
    schedule: str, pp: int, virtual_stages: int, num_micro_batches: int
) -> list[list[Action]]:
    """Per pp rank, what it computes, in order. Raises ValueError if the schedule does not take so many micro-batches."""
    return [
        _actions_of_rank(schedule, rank, pp, virtual_stages, num_micro_batches)
        for rank in range(pp)
    ]


def _actions_of_rank(
    schedule: str, rank: int, pp: int, virtual_stages: int, num_micro_batches: int
) -> list[Action]:
    actions: list[Action] = []
    num_stages = pp * stages_per_rank(schedule, virtual_stages)
    stages = [
        _RecordingStage(stage, num_stages, rank, pp, actions)
        for stage in stages_of_rank(schedule, rank, pp, virtual_stages)
    ]
    made = make_schedule(schedule, stages, num_micro_batches, lambda output, target: output)
    # Nothing to allocate or to exchange shapes about.
    made._initialize_stage = made._initialize_stages = lambda *_, **__: None
    n = num_micro_batches
    made._step_microbatches([()] * n, [{}] * n, [None] * n, return_outputs=False)
    return actions


class _RecordingStage:
    """What a schedule asks of torch's PipelineStage; notes the computations, has nothing to send or to receive."""

    def __init__(
        self, stage: int, num_stages: int, rank: int, pp: int, actions: list[Action]
    ) -> None:
        self.stage_index, self.num_stages = stage, num_stages
        self.group_rank, self.group_size = rank, pp
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.submod = torch.nn.Identity()
        self.has_backward = True
        self._actions = actions

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> torch.Tensor:
        self._actions.append(Action("F", self.stage_index, micro_batch))
        return torch.zeros(())

    def backward_one_chunk(self, micro_batch: int, *, full_backward: bool = True, **_: Any) -> None:
        self._actions.append(Action("B" if full_backward else "I", self.stage_index, micro_batch))

    def backward_weight_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self._actions.append(Action("W", self.stage_index, micro_batch))

    def get_fwd_send_ops(self, micro_batch: int) -> list[Any]:
        return self._sent(("F",), micro_batch)

    def get_bwd_send_ops(self, micro_batch: int) -> list[Any]:
        return self._sent(("B", "I"), micro_batch)

    def _sent(self, kinds: tuple[str, ...], micro_batch: int) -> list[Any]:
        """torch sends both results of a pair F&B after the pair."""
        for back, action in enumerate(reversed(self._actions)):
            at = (action.stage, action.micro_batch)
            if action.kind in kinds and at == (self.stage_index, micro_batch):
                self._actions[-1 - back] = action._replace(sent_after=back)
                break
        return []

    def get_fwd_recv_ops(self, micro_batch: int) -> list[Any]:
        return []

    get_bwd_recv_ops = get_fwd_recv_ops

    def set_local_fwd_input(self, *_: Any) -> None:
        """From a stage of the same rank."""

    set_local_bwd_input = set_local_fwd_input

    def get_local_bwd_output(self, micro_batch: int) -> tuple[()]:
        return ()

    def perform_reduce_grad(self, factor: int) -> None:
        """After the last micro-batch."""


def with_torch_first_stage(each: Durations, table: Table) -> dict[int, Durations]:
    """Every stage's durations, where `each` is what they compute, as torch runs them.

    A split backward of stage 0 hands nothing on, and torch computes all of it in W (PipelineStage.backward_one_chunk).
    """
    stages = sorted({action.stage for actions in table for action in actions})
    first = replace(each, input_gradient=0.0, weight_gradient=each.backward)
    return {stage: each if stage else first for stage in stages}
