"""A decoder cut into pipeline stages, run by torch.distributed.pipelining's schedules.

A stage hands on hidden states [T, D], the routing losses so far and, where the router has one, its state. The last
stage turns them into the loss; gradients of all three flow back, so that every auxiliary loss is optimised as on one
rank. Torch deals out the micro-batches' numbers alone, by which stages look up what they are fed: so that these may
have different numbers of tokens.

Shapes: n micro-batches, T rows of this rank in one, N targets ahead of a token, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from moesys.config.schema import ModelConfig, ParallelConfig
from moesys.models.transformer import Transformer
from moesys.ops.shard import local_tensor
from moesys.parallel.mesh import Meshes
from moesys.parallelize.schedules import make_schedule
from moesys.plan.pipeline import layers_of_stages, stages_of_rank, with_empty_micro_batches

LossFunction = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(what the last stage returns, targets_BSN) -> what is minimised."""
Fed = Mapping[str, Any]
"""What all stages are told of a micro-batch, as Transformer.forward takes it; the first one's x are the ids_BS."""
Shapes = list[tuple[int, ...]]


class _Stage(PipelineStage):
    """One whose micro-batches need not have as many rows."""

    shapes_n: Sequence[Shapes]
    """Of what travels between stages, in each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runtime_validate = False  # with debugging on, that shapes stay

    def fit(self) -> None:
        """Receive what is of these shapes."""
        for infos in (self.args_recv_info, self.grad_recv_info):
            for index, received in infos.items():
                for info, shape in zip(received, self.shapes_n[index], strict=False):
                    if info.buffer is not None and info.buffer.shape != shape:
                        info.buffer = info.buffer.new_empty(shape)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_forward_infra(*args, **kwargs)
        self.fit()
        return found

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_backward_infra(*args, **kwargs)
        self.fit()
        return found


class Pipeline:
    """The stages of this rank, and the schedule that runs them with those of the other ranks. Made on the meta device."""

    def __init__(
        self, config: ModelConfig, parallel: ParallelConfig, meshes: Meshes, seq_len: int
    ) -> None:
        """`seq_len` of whole sequences, by which layers are shared out."""
        self.parallel = parallel
        self.meshes = meshes
        self.layers = layers_of_stages(config, parallel, seq_len)
        rank = meshes.dense.get_local_rank("pp")
        self.stage_ids = stages_of_rank(
            parallel.pp_schedule, rank, parallel.pp, parallel.pp_virtual_stages
        )
        routers = [layer.router for layer in Transformer(config).moe_layers()]
        self._state_dim: int = max((getattr(r, "state_dim", 0) for r in routers), default=0)
        self.parts = [Transformer(config, self.layers[stage]) for stage in self.stage_ids]
        for part in self.parts:
            part.forward = self._looked_up(part, part.forward)
        self._fed_n: Sequence[Fed] = ()
        self._stages: list[_Stage] = []
        self._schedule: Any | None = None

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage_ids[-1] == len(self.layers) - 1

    def rank_of_stage(self, stage: int) -> int:
        """The pp rank that runs it."""
        schedule, pp = self.parallel.pp_schedule, self.parallel.pp
        virtual = self.parallel.pp_virtual_stages
        return next(r for r in range(pp) if stage in stages_of_rank(schedule, r, pp, virtual))

    def start(self, device: torch.device, loss_function: LossFunction) -> None:
        """Once the parts have storage."""
        self._device = device
        self._loss_function = loss_function

    def step(self, fed_n: Sequence[Fed]) -> None:
        """Forward and backward of all micro-batches; gradients are added to the parameters'.

        Raises ValueError for a number of them that the schedule cannot run.
        """
        shapes_n = [self._travelling(fed["ids_BS"]) for fed in fed_n]
        if self._schedule is None or len(fed_n) != len(self._fed_n):
            self._make_schedule(len(fed_n), shapes_n[0])
        self._fed_n = fed_n
        for stage in self._stages:
            stage.shapes_n = shapes_n
            stage.fit()
        numbers = torch.arange(len(fed_n))
        inputs = (numbers,) if 0 in self.stage_ids else ()
        target = numbers if self.has_last else None
        assert self._schedule is not None
        self._schedule.step(*inputs, target=target, return_outputs=False, number=numbers)
        for part in self.parts:
            _lay_out_gradients(part)

    def with_empty(self, number: int) -> int:
        """The least number of micro-batches, of which so many have tokens, that the schedule runs."""
        parallel = self.parallel
        return with_empty_micro_batches(
            parallel.pp_schedule, parallel.pp, parallel.pp_virtual_stages, number
        )

    def _make_schedule(self, num_micro_batches: int, shapes: Shapes) -> None:
        last = len(self.layers) - 1
        number = (torch.empty(1, dtype=torch.int64, device="meta"),)
        travelling = self._metas(shapes)
        # No one receives what the last stage returns: only how much it is counts.
        returned = self._metas([()] * (2 + self.parts[0].config.mtp_depth))
        self._stages = [
            _Stage(
                part,
                stage,
                len(self.layers),
                self._device,
                input_args=travelling if stage else number,
                output_args=travelling if stage < last else returned,
                group=self.meshes.pp_group,
            )
            for stage, part in zip(self.stage_ids, self.parts, strict=True)
        ]
        self._schedule = make_schedule(
            self.parallel.pp_schedule, self._stages, num_micro_batches, self._loss
        )

    def _looked_up(
        self, part: Transformer, forward: Callable[..., tuple[Tensor, ...]]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """A part's forward that is told a micro-batch's number, and in the first stage nothing else."""

        def run(*received: Tensor, number: Tensor) -> tuple[Tensor, ...]:
            fed = self._fed_n[int(number)]
            ids_BS: Tensor = fed["ids_BS"]
            part.seq_len, part.state_shape = ids_BS.shape[1], self._state_shape(ids_BS)
            return forward(*((ids_BS,) if part.is_first else received), **fed)

        return run

    def _loss(self, output: tuple[Tensor, ...], number: Tensor) -> Tensor:
        return self._loss_function(output, self._fed_n[int(number)]["targets_BSN"])

    @torch.no_grad()
    def forward(self, fed: Fed) -> tuple[Tensor, ...] | None:
        """One micro-batch through all stages; the last stage's output where it is, else None.

        A rank hands on and goes to its next micro-batch, so that successive ones follow each other through the stages.
        """
        here = self.meshes.dense.get_local_rank("pp")
        self._fed_n = [fed]
        number = torch.zeros(1, dtype=torch.int64)
        output: tuple[Tensor, ...] = ()
        for stage, part in zip(self.stage_ids, self.parts, strict=True):
            if stage and (source := self.rank_of_stage(stage - 1)) != here:
                output = tuple(self._receive(source, fed["ids_BS"]))
            output = part(*output, number=number)
            if stage < len(self.layers) - 1 and (target := self.rank_of_stage(stage + 1)) != here:
                for tensor in output:
                    dist.send(tensor.contiguous(), group=self.meshes.pp_group, group_dst=target)
        return output if self.has_last else None

    def _receive(self, source: int, ids_BS: Tensor) -> list[Tensor]:
        buffers = [torch.empty(s, device=ids_BS.device) for s in self._travelling(ids_BS)]
        for buffer in buffers:
            dist.recv(buffer, group=self.meshes.pp_group, group_src=source)
        return buffers

    def _travelling(self, ids_BS: Tensor) -> Shapes:
        """Of what goes from stage to stage."""
        tokens = ids_BS.numel()
        if self.parallel.sequence_parallel:
            tokens //= self.meshes.dims.tp
        shapes: Shapes = [(tokens, self.parts[0].config.d_model), (3,)]
        state_shape = self._state_shape(ids_BS)
        return shapes if state_shape is None else [*shapes, state_shape]

    def _state_shape(self, ids_BS: Tensor) -> tuple[int, int] | None:
        """Of what routers hand on."""
        routed_tokens = ids_BS.numel() // self.meshes.dims.tp
        return (routed_tokens, self._state_dim) if self._state_dim else None

    def _metas(self, shapes: Shapes) -> tuple[Tensor, ...]:
        return tuple(torch.empty(s, device="meta", requires_grad=True) for s in shapes)


def _lay_out_gradients(part: nn.Module) -> None:
    """As their parameters lie: a split backward gives what autograd made, a whole one sees to it, and torch's fused AdamW on
    a CPU reads the numbers in the parameter's order."""
    for parameter in part.parameters():
        grad = parameter.grad
        if grad is not None and local_tensor(grad).stride() != local_tensor(parameter).stride():
            parameter.grad = grad.contiguous()
