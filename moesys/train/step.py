"""One optimizer step: micro-steps forward and backward, gradients over replicas, clip, update, balance.

Shapes: B sequences of S tokens in a micro-batch, M MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import RunConfig
from moesys.data.loader import MicroBatch
from moesys.models.transformer import MoEBlock
from moesys.moe.balance import updated_bias
from moesys.moe.dispatch import ExpertParallelDispatcher
from moesys.optim.build import set_learning_rate
from moesys.optim.clip import gradient_norm, scale_gradients
from moesys.parallel.gradients import sum_over_replicas
from moesys.parallel.mesh import Meshes
from moesys.parallelize.build import ParallelModel
from moesys.parallelize.context import local_slice
from moesys.parallelize.data import begin_micro_step
from moesys.parallelize.pipeline import Pipeline
from moesys.train.timing import SectionTimer


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float
    """Cross-entropy, nats per token."""
    balance_loss: float
    """Summed over layers, without coefficient, mean over tokens."""
    z_loss: float
    grad_norm: float
    """Before clipping."""
    expert_load_ME: list[list[int]]
    """Slots per expert as routed."""
    dropped_slots: int
    sent_bytes: int
    """Rows that exchanges sent from any rank to another, forward and backward."""
    exchange_ms: float
    """Mean over ranks; part of forward and backward."""
    stop_requested: bool
    """Some rank was asked to stop."""


class TrainStep:
    """Owns the order of things within an optimizer step. Every rank calls it with as many micro-batches."""

    def __init__(
        self,
        parallel: ParallelModel,
        optimizer: torch.optim.Optimizer,
        meshes: Meshes,
        config: RunConfig,
        timer: SectionTimer,
    ) -> None:
        self.parallel = parallel
        self.model = parallel.whole
        self.optimizer = optimizer
        self.meshes = meshes
        self.config = config
        self.timer = timer
        self.device = next(self.model.parameters()).device
        if parallel.pipeline is not None:
            self._start_pipeline(parallel.pipeline)

    def __call__(
        self, micro_batches: Sequence[MicroBatch], lr: float, stop_requested: bool = False
    ) -> StepResult:
        self.model.train()
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, balance, z
        if self.parallel.pipeline is not None:
            self._run_pipeline(self.parallel.pipeline, micro_batches)
        else:
            for index, batch in enumerate(micro_batches):
                self._begin_micro_step(is_last=index == len(micro_batches) - 1)
                self._forward_backward(batch)
        with self.timer.section("optimizer"):
            gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}
            self._reduce()
            counted = [grad for p, grad in gradients.items() if p not in self.parallel.copies]
            norm = gradient_norm(counted, self.meshes.dims.stage_size)
            if self.config.optim.clip_grad_norm:
                scale_gradients([*gradients.values()], norm, self.config.optim.clip_grad_norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            load_MX = self._finish_balance()
        return self._result(norm, load_MX, stop_requested)

    def _forward_backward(self, batch: MicroBatch) -> None:
        """Add one micro-batch's gradients."""
        input_ids_BS = local_slice(batch.input_ids_BS, self.meshes).to(
            self.device, non_blocking=True
        )
        target_ids_BS = local_slice(batch.target_ids_BS, self.meshes).to(
            self.device, non_blocking=True
        )
        with self.timer.section("forward"):
            with autocast(self.device, self.config.train.dtype):
                output = self.model(input_ids_BS, documents=batch.document_ids_BS)
            total = self._loss(output, target_ids_BS)
        with self.timer.section("backward"):
            total.backward()

    def _loss(self, output: tuple[Tensor, ...], target_ids_BS: Tensor) -> Tensor:
        """What is minimised: sums over ranks and micro-steps, divided once by the global token count.

        Adds to this rank's sums of loss, balance and z over its tokens.
        """
        logits_TV, losses_3 = output
        tp_size = self.meshes.dims.tp
        loss_sum = self.parallel.parts[-1].cross_entropy_sum(logits_TV, target_ids_BS.flatten())
        routing_sums_3 = losses_3 * (target_ids_BS.numel() // tp_size)
        # All ranks of tp have the same cross-entropy, and routed their own tokens.
        sums = torch.stack([loss_sum / tp_size, *routing_sums_3[1:]])
        self.sums += sums.detach().double()
        return (loss_sum + routing_sums_3[0]) / self.config.train.global_batch_tokens

    def _start_pipeline(self, pipeline: Pipeline) -> None:
        train = self.config.train
        for part in pipeline.parts:
            part.forward = autocast(self.device, train.dtype)(part.forward)
        micro_steps = train.global_batch_tokens // (train.micro_batch_tokens * self.meshes.dims.dp)
        pipeline.start(self.device, micro_steps, self._loss)

    def _run_pipeline(self, pipeline: Pipeline, micro_batches: Sequence[MicroBatch]) -> None:
        """All micro-batches forward and backward; their sections interleave, so the time is all the forward's."""
        inputs = torch.cat([local_slice(b.input_ids_BS, self.meshes) for b in micro_batches])
        targets = torch.cat([local_slice(b.target_ids_BS, self.meshes) for b in micro_batches])
        documents = [b.document_ids_BS for b in micro_batches if b.document_ids_BS is not None]
        with self.timer.section("forward"):
            pipeline.step(
                inputs.to(self.device),
                targets.to(self.device),
                torch.cat(documents) if documents else None,
            )

    def _begin_micro_step(self, is_last: bool) -> None:
        for part in self.parallel.parts:
            begin_micro_step(part, self.config.parallel.zero, is_last)

    def _reduce(self) -> None:
        for group, parameters in self.parallel.gradient_sums:
            sum_over_replicas([p.grad for p in parameters if p.grad is not None], group)

    @torch.no_grad()
    def _finish_balance(self) -> Tensor:
        """Sum the step's expert load over ranks, move the selection biases; return int64 [M, E + 1] of all stages."""
        model = self.config.model
        num_moe = model.num_layers - model.num_dense_layers
        load_MX = torch.zeros(
            num_moe, model.moe.num_experts + 1, dtype=torch.int64, device=self.device
        )
        layers = {
            int(index) - model.num_dense_layers: block.moe
            for index, block in self.model.layers.items()
            if isinstance(block, MoEBlock)
        }
        for index, layer in layers.items():
            load_MX[index] = layer.load.take(self.device)
        dist.all_reduce(load_MX)
        for index, layer in layers.items():
            layer.balance.end_step()
            rate = layer.config.balance.bias_update_rate
            if rate:
                bias_E = layer.router.get_buffer("selection_bias_E")
                bias_E.copy_(updated_bias(bias_E, load_MX[index, :-1], rate))
        return load_MX

    def _result(self, norm: Tensor, load_MX: Tensor, stop_requested: bool) -> StepResult:
        """One all-reduce of a few numbers, and the step's only reads on the host."""
        sent_bytes, exchange_s = self.read_exchange_meters()
        host = torch.tensor(
            [float(sent_bytes), exchange_s, float(stop_requested)], dtype=torch.float64
        )
        numbers = torch.cat([self.sums, host.to(self.device)])
        dist.all_reduce(numbers)
        loss, balance, z, sent, seconds, stops = numbers.tolist()
        tokens = self.config.train.global_batch_tokens
        load = load_MX.tolist()
        return StepResult(
            loss=loss / tokens,
            balance_loss=balance / tokens,
            z_loss=z / tokens,
            grad_norm=norm.item(),
            expert_load_ME=[row[:-1] for row in load],
            dropped_slots=sum(row[-1] for row in load),
            sent_bytes=int(sent),
            exchange_ms=seconds * 1e3 / self.meshes.dims.world_size,
            stop_requested=stops > 0,
        )

    def read_exchange_meters(self) -> tuple[int, float]:
        """This rank's bytes sent and seconds spent by all layers' exchanges since the last read."""
        sent_bytes, exchange_s = 0, 0.0
        for layer in self.model.moe_layers():
            if isinstance(layer.dispatcher, ExpertParallelDispatcher):
                for exchange in layer.dispatcher.exchanges():
                    layer_bytes, layer_s = exchange.meter.read()
                    sent_bytes, exchange_s = sent_bytes + layer_bytes, exchange_s + layer_s
        return sent_bytes, exchange_s


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Compute in bf16 where torch's autocast rules say so; fp32 = off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")
