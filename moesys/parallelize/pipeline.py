"""A decoder cut into pipeline stages, run by torch.distributed.pipelining's schedules.

A stage hands on hidden states [T, D], the routing losses so far and, where the router has one, its state. The last
stage turns them into the loss; gradients of all three flow back, so that every auxiliary loss is optimised as on one
rank. Shapes: n micro-batches of B sequences of S tokens, T tokens of this rank in one, N targets ahead of a token,
D model.
"""

from collections.abc import Callable
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
from moesys.plan.pipeline import layers_of_stages, stages_of_rank

LossFunction = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(what the last stage returns, targets_BSN) -> what is minimised."""


class Pipeline:
    """The stages of this rank, and the schedule that runs them with those of the other ranks. Made on the meta device."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        meshes: Meshes,
        *,
        micro_batch_samples: int,
        seq_len: int,
    ) -> None:
        self.parallel = parallel
        self.meshes = meshes
        self.micro_batch_samples = micro_batch_samples
        self.seq_len = seq_len // meshes.dims.cp
        """Of the slices that this rank sees."""
        self.layers = layers_of_stages(config, parallel, seq_len)
        rank = meshes.dense.get_local_rank("pp")
        self.stage_ids = stages_of_rank(
            parallel.pp_schedule, rank, parallel.pp, parallel.pp_virtual_stages
        )
        routers = [layer.router for layer in Transformer(config).moe_layers()]
        state_dim: int = max((getattr(r, "state_dim", 0) for r in routers), default=0)
        routed_tokens = micro_batch_samples * self.seq_len // meshes.dims.tp
        self.state_shape = (routed_tokens, state_dim) if state_dim else None
        self.parts: list[Transformer] = []
        for stage in self.stage_ids:
            part = Transformer(config, self.layers[stage])
            part.seq_len, part.state_shape = self.seq_len, self.state_shape
            self.parts.append(part)
        self._schedule: Any = None

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage_ids[-1] == len(self.layers) - 1

    def rank_of_stage(self, stage: int) -> int:
        """The pp rank that runs it."""
        schedule, pp = self.parallel.pp_schedule, self.parallel.pp
        virtual = self.parallel.pp_virtual_stages
        return next(r for r in range(pp) if stage in stages_of_rank(schedule, r, pp, virtual))

    def start(
        self, device: torch.device, num_micro_batches: int, loss_function: LossFunction
    ) -> None:
        """Build the schedule, once the parts have storage. Raises ValueError if it cannot run so many."""
        metas, last = self._metas(), len(self.layers) - 1
        stages = [
            PipelineStage(
                part,
                stage,
                len(self.layers),
                device,
                input_args=metas if stage else self._ids_meta(),
                output_args=metas if stage < last else self._last_metas(),
                group=self.meshes.pp_group,
            )
            for stage, part in zip(self.stage_ids, self.parts, strict=True)
        ]
        self._schedule = make_schedule(
            self.parallel.pp_schedule, stages, num_micro_batches, loss_function
        )

    def step(
        self, input_ids: Tensor, targets: Tensor, places: Tensor, documents: Tensor | None
    ) -> None:
        """Forward and backward of all micro-batches [n * B, S], targets [n * B, S, N]; gradients are added to the
        parameters'."""
        inputs = (input_ids,) if 0 in self.stage_ids else ()
        options = {"ids_BS": input_ids, "places_BS": places, "targets_BSN": targets}
        if documents is not None:
            options["documents"] = documents
        target = targets if self.has_last else None
        self._schedule.step(*inputs, target=target, return_outputs=False, **options)
        for part in self.parts:
            _lay_out_gradients(part)

    @torch.no_grad()
    def forward(
        self, input_ids_BS: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, ...] | None:
        """One micro-batch through all stages; the last stage's output where it is, else None.

        A rank hands on and goes to its next micro-batch, so that successive ones follow each other through the stages.
        """
        here = self.meshes.dense.get_local_rank("pp")
        options = {"documents": documents, "ids_BS": input_ids_BS}
        output: tuple[Tensor, ...] = ()
        for stage, part in zip(self.stage_ids, self.parts, strict=True):
            if stage == 0:
                output = part(input_ids_BS, **options)
            elif (source := self.rank_of_stage(stage - 1)) == here:
                output = part(*output, **options)
            else:
                received = self._receive(source, input_ids_BS.device)
                output = part(*received, **options)
            if stage < len(self.layers) - 1 and (target := self.rank_of_stage(stage + 1)) != here:
                for tensor in output:
                    dist.send(tensor.contiguous(), group=self.meshes.pp_group, group_dst=target)
        return output if self.has_last else None

    def _receive(self, source: int, device: torch.device) -> list[Tensor]:
        buffers = [torch.empty(m.shape, dtype=m.dtype, device=device) for m in self._metas()]
        for buffer in buffers:
            dist.recv(buffer, group=self.meshes.pp_group, group_src=source)
        return buffers

    def _metas(self) -> tuple[Tensor, ...]:
        """What travels from stage to stage."""
        tokens = self.micro_batch_samples * self.seq_len
        if self.parallel.sequence_parallel:
            tokens //= self.meshes.dims.tp
        shapes: list[tuple[int, ...]] = [(tokens, self.parts[0].config.d_model), (3,)]
        if self.state_shape is not None:
            shapes.append(self.state_shape)
        return tuple(torch.empty(s, device="meta", requires_grad=True) for s in shapes)

    def _last_metas(self) -> tuple[Tensor, ...]:
        """What the last stage returns: no one's to receive, so only their number counts."""
        config = self.parts[0].config
        tokens = self.micro_batch_samples * self.seq_len
        logits = torch.empty((tokens, config.vocab_size), device="meta", requires_grad=True)
        losses = torch.empty(3, device="meta", requires_grad=True)
        return (logits, losses, *[logits] * config.mtp_depth)

    def _ids_meta(self) -> tuple[Tensor, ...]:
        shape = (self.micro_batch_samples, self.seq_len)
        return (torch.empty(shape, dtype=torch.int64, device="meta"),)


def _lay_out_gradients(part: nn.Module) -> None:
    """As their parameters lie: a split backward gives what autograd made, a whole one sees to it, and torch's fused AdamW on
    a CPU reads the numbers in the parameter's order."""
    for parameter in part.parameters():
        grad = parameter.grad
        if grad is not None and local_tensor(grad).stride() != local_tensor(parameter).stride():
            parameter.grad = grad.contiguous()
