"""One optimizer step: micro-steps forward and backward, gradients over replicas, clip, update, balance.

Shapes: B sequences of S tokens in a micro-batch, N targets ahead of a token, M MoE layers, E experts, W ranks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys.config.schema import RunConfig
from moesys.data.loader import MicroBatch
from moesys.data.step_batch import RankBatch, StepBatch
from moesys.models.mtp import targets_ahead
from moesys.moe.balance import updated_bias
from moesys.moe.layer import MoELayer
from moesys.moe.routing import FollowsLoad, StepLoad
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.optim.build import set_learning_rate
from moesys.optim.clip import gradient_norm, scale_gradients
from moesys.optim.frozen import keep_frozen
from moesys.parallel.exchange import Traffic
from moesys.parallel.gradients import sum_over_replicas
from moesys.parallel.mesh import Meshes
from moesys.parallelize.build import ParallelModel
from moesys.parallelize.context import local_slice
from moesys.parallelize.data import begin_micro_step
from moesys.parallelize.pipeline import Pipeline
from moesys.train.choices import ChoiceRecorder
from moesys.train.placement_figures import PlacementFigures
from moesys.train.placements import Placements
from moesys.train.timing import SectionTimer


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, over all ranks."""

    num_tokens: int
    mean_length_tokens: float
    """Of the sequence that a token is in, mean over tokens: what a token's attention is proportional to."""
    loss: float
    """Cross-entropy, nats per token."""
    balance_loss: float
    """Summed over layers, without coefficient, mean over tokens."""
    z_loss: float
    mtp_loss: float
    """Of multi-token prediction: nats per token predicted, over all depths; 0 without."""
    grad_norm: float
    """Before clipping."""
    expert_load_ME: list[list[int]]
    """Slots per expert as routed; layers may have different numbers of experts."""
    dropped_slots_M: list[int]
    """Slots over capacity."""
    router_entropy_M: list[float]
    """Of a token's routing probabilities, nats, mean over tokens: ln E = undecided, 0 = sure."""
    sent_bytes: int
    """Rows that exchanges sent from any rank to another, forward and backward."""
    plain_bytes: int
    """That the same rows would have as they are, not written in few bits."""
    between_nodes_bytes_N: list[int]
    """Of those sent, by ranks of each node to other nodes; [] on one node."""
    exchange_ms: float
    """Mean over ranks; part of forward and backward."""
    placement: PlacementFigures | None = None
    """Where experts may have copies."""
    coded_rows_M: list[int]
    """Rows that a codec made of each layer's slots, 0 of a layer that has none; [] in a step without one."""
    stop_requested: bool
    """Some rank was asked to stop."""
    is_applied: bool
    """The optimizer has stepped; if not, the step left no trace in weights, optimizer state and selection biases."""

    @property
    def between_nodes_bytes(self) -> int:
        """Of all nodes."""
        return sum(self.between_nodes_bytes_N)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of all ranks, on the host."""

    loss: float
    balance: float
    z: float
    mtp: float
    sent_bytes: float
    plain_bytes: float
    between_nodes_bytes_N: list[float]
    exchange_s: float
    placed: list[float]
    coded_rows_M: list[float]
    stops: float
    grad_norm: float
    expert_load_MX: list[list[int]]
    entropy_M: list[float]


Judge = Callable[[float, float], float | None]
"""From loss and gradient norm, the same on all ranks, to the learning rate of the update; None = none is made."""


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
        self.compute_ms: float | None = None
        """Set before a step: what this rank tells the others with the step's numbers, all ranks or none."""
        self.compute_ms_W: list[float] = []
        """What each rank told in the last step; empty where none did."""
        self.own_exchange_ms = 0.0
        """This rank's in the last step."""
        self.compresses = True
        """Whether the last step had codec and wire, where the configuration has them."""
        if parallel.pipeline is not None:
            self._start_pipeline(parallel.pipeline)
        self._recorder = ChoiceRecorder(config, self.model, self.device)
        self.placements = Placements(config, self.model, optimizer, meshes)

    def __call__(
        self,
        batch: Sequence[MicroBatch] | StepBatch,
        lr: float,
        stop_requested: bool = False,
        judge: Judge | None = None,
        step: int = 1,
    ) -> StepResult:
        """`step` is its number, from 1.

        `batch` is what the loader gives: a data rank's samples, or this rank's pieces of sequences.
        The host waits for the device once: at the end, or with a `judge` before the update, which then runs on.
        """
        self.batch = self._filled(batch)
        self.model.train()
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, balance, z, mtp
        self.compresses = step > self.config.dispatch.warmup_steps
        for layer in self.model.moe_layers():
            layer.compresses = self.compresses
        self.placements.begin(step, len(self.batch.micro_batches))
        with self._recorder.recording(step):
            self._run_micro_steps()
        with self.timer.section("optimizer"):
            self.placements.finish()
            for parameter in self.model.over_depth.parameters():
                if parameter.grad is None:  # a stage without MoE layers
                    parameter.grad = torch.zeros_like(parameter)
            gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}
            self._reduce()
            if self.config.optim.frozen_experts is not None:
                keep_frozen(self.model.named_parameters(), self.config.optim.frozen_experts)
            counted = [grad for p, grad in gradients.items() if p not in self.parallel.copies]
            norm = gradient_norm(counted, self.meshes.dims.stage_size)
            load_MX = self._sum_load()
            rate, sums = lr, None
            if judge is not None:
                sums = self._read_sums(norm, load_MX, stop_requested)
                rate = judge(sums.loss / self.batch.num_tokens, sums.grad_norm)
            if rate is not None:
                if self.config.optim.clip_grad_norm:
                    scale_gradients([*gradients.values()], norm, self.config.optim.clip_grad_norm)
                set_learning_rate(self.optimizer, rate)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._end_balance(load_MX, step, is_applied=rate is not None)
        if rate is not None:
            self._recorder.write(step, self.batch.num_tokens)
        sums = sums or self._read_sums(norm, load_MX, stop_requested)
        self.placements.observe(step, [row[:-1] for row in sums.expert_load_MX], sums.placed)
        return self._result(sums, is_applied=rate is not None)

    def rehearse(self, batch: StepBatch) -> float:
        """Seconds of this rank's forwards and backwards, which leave no trace but in random states. Collective as a step."""
        self.batch = batch
        self.model.train()
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._synchronize()
        began = time.perf_counter()
        self._run_micro_steps()
        self._synchronize()
        seconds = time.perf_counter() - began
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.model.moe_layers():
            layer.balance.end_step()
        self._read_sums(self.sums.new_zeros(()), self._sum_load(), stop_requested=False)
        self.timer.read()
        return seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _filled(self, batch: Sequence[MicroBatch] | StepBatch) -> StepBatch:
        """This rank's, with what a pipeline needs beside the micro-batches of a plan."""
        batch = batch if isinstance(batch, StepBatch) else self._of_samples(batch)
        pipeline, number = self.parallel.pipeline, len(batch.micro_batches)
        number = number if pipeline is None else pipeline.with_empty(number)
        return batch.filled(number, self.config.model.mtp_depth)

    def _of_samples(self, micro_batches: Sequence[MicroBatch]) -> StepBatch:
        """This rank's positions of samples of equal length."""
        config = self.config
        samples = config.train.global_batch_tokens // config.data.seq_len
        return StepBatch(
            micro_batches=[
                RankBatch(
                    input_ids_BS=local_slice(batch.input_ids_BS, self.meshes),
                    targets_BSN=self._targets(batch),
                    places_BS=self._places(batch, index),
                    document_ids_BS=batch.document_ids_BS,
                )
                for index, batch in enumerate(micro_batches)
            ],
            lengths_L=np.full(samples, config.data.seq_len),
        )

    def _targets(self, batch: MicroBatch) -> Tensor:
        """[B, S, N] of this rank's positions."""
        ahead_BSN = targets_ahead(batch.target_ids_BS, self.config.model.mtp_depth)
        return local_slice(ahead_BSN, self.meshes)

    def _places(self, batch: MicroBatch, index: int) -> Tensor:
        """int64 [B, S] of this rank's positions: among all tokens of the step, as the loader deals out its samples."""
        ids_BS = batch.input_ids_BS
        number = ids_BS.numel()
        first = (index * self.meshes.dims.dp + self.meshes.dp_rank) * number
        places_BS = torch.arange(first, first + number).view_as(ids_BS)
        return local_slice(places_BS, self.meshes)

    def _run_micro_steps(self) -> None:
        """Forwards and backwards."""
        if self.parallel.pipeline is not None:
            self._run_pipeline(self.parallel.pipeline)
            return
        micro_batches = self.batch.micro_batches
        for index, batch in enumerate(micro_batches):
            self._begin_micro_step(is_last=index == len(micro_batches) - 1)
            self._forward_backward(batch)

    def _forward_backward(self, batch: RankBatch) -> None:
        """Add the gradients of one micro-batch."""
        fed = batch.fed(self.device)
        with self.timer.section("forward"):
            with autocast(self.device, self.config.train.dtype):
                output = self.model(fed["ids_BS"], **fed)
            total = self._loss(output, fed["targets_BSN"])
        with self.timer.section("backward"):
            total.backward()

    def _loss(self, output: tuple[Tensor, ...], targets_BSN: Tensor) -> Tensor:
        """What is minimised: sums over ranks and micro-steps, divided once by the global token count.

        Adds to this rank's sums of loss, balance, z and multi-token prediction over its tokens.
        """
        logits_TV, losses_3, *ahead = output
        model, tp_size = self.config.model, self.meshes.dims.tp
        loss_of = self.parallel.parts[-1].cross_entropy_sum
        targets_NT = targets_BSN.flatten(0, 1).T.contiguous()
        loss_sum = loss_of(logits_TV, targets_NT[0])
        of_depths = [
            loss_of(logits_TV, t_T) for logits_TV, t_T in zip(ahead, targets_NT[1:], strict=True)
        ]
        mtp_sum = torch.stack(of_depths).sum() if of_depths else torch.zeros_like(loss_sum)
        routing_sums_3 = losses_3 * self._num_routed(targets_NT[0])
        # All ranks of tp have the same cross-entropies, and routed their own tokens.
        sums = torch.stack([loss_sum / tp_size, *routing_sums_3[1:], mtp_sum / tp_size])
        self.sums += sums.detach().double()
        total = loss_sum + routing_sums_3[0]
        if of_depths:
            total = total + model.mtp_loss_coef / model.mtp_depth * mtp_sum
        return total / self.batch.num_tokens

    def _num_routed(self, targets_T: Tensor) -> int | Tensor:
        """Tokens whose routing losses this rank has the means of: of those of its tp ranks its own."""
        tp_size = self.meshes.dims.tp
        if tp_size == 1 or not self.config.batch.is_planned:
            return len(targets_T) // tp_size
        own_T = targets_T.chunk(tp_size)[dist.get_rank(self.meshes.tp_group)]
        return (own_T != IGNORED_TARGET).sum()

    def _start_pipeline(self, pipeline: Pipeline) -> None:
        train = self.config.train
        for part in pipeline.parts:
            part.forward = autocast(self.device, train.dtype)(part.forward)
        pipeline.start(self.device, self._loss)

    def _run_pipeline(self, pipeline: Pipeline) -> None:
        """All micro-batches forward and backward; their sections interleave, so the time is all the forward's."""
        with self.timer.section("forward"):
            pipeline.step([batch.fed(self.device) for batch in self.batch.micro_batches])

    def _begin_micro_step(self, is_last: bool) -> None:
        for part in self.parallel.parts:
            begin_micro_step(part, self.config.parallel.zero, is_last)

    def _reduce(self) -> None:
        for group, parameters in self.parallel.gradient_sums:
            sum_over_replicas([p.grad for p in parameters if p.grad is not None], group)

    def _sum_load(self) -> Tensor:
        """Take the step's expert load; return it summed over ranks, int64 [M, E + 1] of all stages.

        E is the most that a layer has; the dropped slots are last.
        """
        model = self.config.model
        shape = (len(model.moe_layers), model.moe.num_choices + 1)
        load_MX = torch.zeros(shape, dtype=torch.int64, device=self.device)
        for index, layer in self.model.moe_places().items():
            taken_X = layer.load.take(self.device)
            load_MX[index, : len(taken_X) - 1], load_MX[index, -1] = taken_X[:-1], taken_X[-1]
        dist.all_reduce(load_MX)
        return load_MX

    @torch.no_grad()
    def _end_balance(self, load_MX: Tensor, step: int, is_applied: bool) -> None:
        """Forget the step's counts; move what follows the load, if weights have moved."""
        load_ME = load_MX[:, :-1]
        for layer in self.model.moe_layers():
            layer.balance.end_step()
        if not is_applied:
            return
        balance = self.config.model.moe.balance
        for router, load in self._routers(load_ME):
            if balance.bias_update_rate and not 0 < balance.bias_end_step < step:
                bias_E = router.get_buffer("selection_bias_E")
                load_E = load.load_ME[load.layer, : len(bias_E)]
                bias_E.copy_(updated_bias(bias_E, load_E, balance.bias_update_rate))
            if isinstance(router, FollowsLoad):
                router.end_step(load)

    def _routers(self, load_ME: Tensor) -> Iterator[tuple[nn.Module, StepLoad]]:
        """This rank's, each with what it routed. One that all layers share has routed every token once for each."""
        tokens = self.batch.num_tokens
        if self.config.model.share_depth != "none":
            for layer in self.model.over_depth.values():
                if isinstance(layer, MoELayer):
                    sum_1E, passes = load_ME.sum(0, keepdim=True), len(load_ME)
                    yield (
                        layer.router,
                        StepLoad(load_ME=sum_1E, layer=0, num_tokens=tokens * passes),
                    )
            return
        for index, layer in self.model.moe_places().items():
            yield layer.router, StepLoad(load_ME=load_ME, layer=index, num_tokens=tokens)

    def _read_sums(self, norm: Tensor, load_MX: Tensor, stop_requested: bool) -> _Sums:
        """One all-reduce of a few numbers, and the step's only reads on the host."""
        own = self.read_exchange_meters()
        host = torch.tensor(
            [own.sent_bytes, own.plain_bytes, own.seconds, stop_requested], dtype=torch.float64
        )
        self.own_exchange_ms = own.seconds * 1e3
        num_nodes, node = self.meshes.nodes
        between_N = torch.zeros(num_nodes, dtype=torch.float64)
        between_N[node] = own.between_nodes_bytes
        between_N = between_N if num_nodes > 1 else between_N[:0]
        told_W = torch.zeros(0, dtype=torch.float64)
        if self.compute_ms is not None:
            told_W = torch.zeros(self.meshes.dims.world_size, dtype=torch.float64)
            told_W[dist.get_rank()] = self.compute_ms
        entropy_M = self.sums.new_zeros(load_MX.shape[0])
        has_codec = bool(self.config.dispatch.codecs) and self.meshes.dims.ep > 1
        rows_M = torch.zeros(len(load_MX) if has_codec else 0, dtype=torch.float64)
        for index, layer in self.model.moe_places().items():
            entropy_M[index] = layer.load.take_entropy(self.device)
            if has_codec:
                rows_M[index], layer.coded_rows = layer.coded_rows, 0
        placed = torch.tensor(self.placements.numbers(), dtype=torch.float64)
        on_host = torch.cat([host, between_N, placed, rows_M, told_W]).to(self.device)
        numbers = torch.cat([self.sums, entropy_M, on_host])
        dist.all_reduce(numbers)
        loss, balance, z, mtp, *rest = numbers.tolist()
        entropies, rest = rest[: len(load_MX)], rest[len(load_MX) :]
        sent_bytes, plain_bytes, exchange_s, stops, *rest = rest
        between, rest = rest[: len(between_N)], rest[len(between_N) :]
        placed, rest = rest[: len(placed)], rest[len(placed) :]
        rows, self.compute_ms_W = rest[: len(rows_M)], rest[len(rows_M) :]
        return _Sums(
            loss=loss,
            balance=balance,
            z=z,
            mtp=mtp,
            sent_bytes=sent_bytes,
            plain_bytes=plain_bytes,
            between_nodes_bytes_N=between,
            exchange_s=exchange_s,
            placed=placed,
            coded_rows_M=rows if self.compresses else [],
            stops=stops,
            grad_norm=norm.item(),
            expert_load_MX=load_MX.tolist(),
            entropy_M=entropies,
        )

    def _result(self, sums: _Sums, is_applied: bool) -> StepResult:
        model, tokens = self.config.model, self.batch.num_tokens
        choices_M = [model.moe_of(layer).num_choices for layer in model.moe_layers]
        return StepResult(
            num_tokens=tokens,
            mean_length_tokens=self.batch.mean_length_tokens,
            loss=sums.loss / tokens,
            balance_loss=sums.balance / tokens,
            z_loss=sums.z / tokens,
            mtp_loss=sums.mtp / max(1, self.batch.tokens_ahead(model.mtp_depth)),
            grad_norm=sums.grad_norm,
            expert_load_ME=[
                row[:number] for row, number in zip(sums.expert_load_MX, choices_M, strict=True)
            ],
            dropped_slots_M=[row[-1] for row in sums.expert_load_MX],
            router_entropy_M=[entropy / tokens for entropy in sums.entropy_M],
            sent_bytes=int(sums.sent_bytes),
            plain_bytes=int(sums.plain_bytes),
            between_nodes_bytes_N=[int(nbytes) for nbytes in sums.between_nodes_bytes_N],
            exchange_ms=sums.exchange_s * 1e3 / self.meshes.dims.world_size,
            placement=self.placements.figures(sums.placed),
            coded_rows_M=[int(rows) for rows in sums.coded_rows_M],
            stop_requested=sums.stops > 0,
            is_applied=is_applied,
        )

    def read_exchange_meters(self) -> Traffic:
        """This rank's, by all layers' exchanges since the last read."""
        layers = self.model.moe_layers()
        exchanges = [exchange for layer in layers for exchange in layer.dispatcher.exchanges()]
        return Traffic.total(exchange.meter.read() for exchange in exchanges)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Compute in bf16 where torch's autocast rules say so; fp32 = off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")
