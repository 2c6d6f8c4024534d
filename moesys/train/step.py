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
from moesys.moe.balance import updated_bias
from moesys.moe.dispatch import ExpertParallelDispatcher
from moesys.optim.build import set_learning_rate
from moesys.optim.clip import gradient_norm, scale_gradients
from moesys.parallel.gradients import sum_over_replicas
from moesys.parallel.mesh import Meshes
from moesys.parallelize.build import ParallelModel
from moesys.parallelize.data import begin_micro_step
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

    def __call__(
        self, micro_batches: Sequence[MicroBatch], lr: float, stop_requested: bool = False
    ) -> StepResult:
        self.model.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, balance, z
        for index, batch in enumerate(micro_batches):
            self._begin_micro_step(is_last=index == len(micro_batches) - 1)
            sums += self._forward_backward(batch)
        with self.timer.section("optimizer"):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._reduce()
            norm = gradient_norm(gradients, self.meshes.dims.stage_size)
            if self.config.optim.clip_grad_norm:
                scale_gradients(gradients, norm, self.config.optim.clip_grad_norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            load_MX = self._finish_balance()
        return self._result(sums, norm, load_MX, stop_requested)

    def _forward_backward(self, batch: MicroBatch) -> Tensor:
        """Add one micro-batch's gradients; return this rank's sums of loss, balance and z over its tokens."""
        input_ids_BS = batch.input_ids_BS.to(self.device, non_blocking=True)
        target_ids_BS = batch.target_ids_BS.to(self.device, non_blocking=True)
        tp_size = self.meshes.dims.tp
        routed_tokens = input_ids_BS.numel() // tp_size
        with self.timer.section("forward"):
            with autocast(self.device, self.config.train.dtype):
                loss_sum, routing = self.model.loss_sum(input_ids_BS, target_ids_BS)
            # Sums over ranks and micro-steps, divided once by the global token count.
            total = (
                loss_sum + routing.total * routed_tokens
            ) / self.config.train.global_batch_tokens
        with self.timer.section("backward"):
            total.backward()
        return torch.stack(
            # All ranks of tp have the same loss.
            [
                loss_sum.detach() / tp_size,
                routing.balance * routed_tokens,
                routing.z * routed_tokens,
            ]
        ).double()

    def _begin_micro_step(self, is_last: bool) -> None:
        for part in self.parallel.parts:
            begin_micro_step(part, self.config.parallel.zero, is_last)

    def _reduce(self) -> None:
        for group, parameters in self.parallel.gradient_sums:
            sum_over_replicas([p.grad for p in parameters if p.grad is not None], group)

    @torch.no_grad()
    def _finish_balance(self) -> Tensor:
        """Sum the step's expert load over ranks, move the selection biases; return int64 [M, E + 1]."""
        layers = self.model.moe_layers()
        if not layers:
            return torch.zeros(0, 1, dtype=torch.int64, device=self.device)
        load_MX = torch.stack([layer.load.take(self.device) for layer in layers])
        dist.all_reduce(load_MX, group=self.meshes.stage_group)
        for layer, load_X in zip(layers, load_MX, strict=True):
            layer.balance.end_step()
            rate = layer.config.balance.bias_update_rate
            if rate:
                bias_E = layer.router.get_buffer("selection_bias_E")
                bias_E.copy_(updated_bias(bias_E, load_X[:-1], rate))
        return load_MX

    def _result(
        self, sums: Tensor, norm: Tensor, load_MX: Tensor, stop_requested: bool
    ) -> StepResult:
        """One all-reduce of a few numbers, and the step's only reads on the host."""
        sent_bytes, exchange_s = self.read_exchange_meters()
        host = torch.tensor(
            [float(sent_bytes), exchange_s, float(stop_requested)], dtype=torch.float64
        )
        numbers = torch.cat([sums, host.to(self.device)])
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
