"""Our model stepped by megatron-core's distributed optimizer, and by us with zero=1: what the ranks run.

Megatron wraps the same modules: its DistributedDataParallel reduces the gradients of dense parameters and experts, its
optimizer measures and clips them, updates this rank's shard and gathers the parameters. Shapes: B samples of S tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.config.schema import (
    BalanceConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.data.loader import MicroBatch
from moesys.models.transformer import Transformer
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.testing.small_run import small_config, small_model
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer
from tests.oracles.megatron_layer import megatron_groups
from tests.oracles.shim import cuda_on_cpu

STEPS, SEQ_LEN, SEQUENCES, LR = 5, 16, 8, 3e-3
CPU = torch.device("cpu")

CONFIG = small_config(
    small_model(
        num_layers=2,
        balance=BalanceConfig(micro_loss_coef=0.1, z_loss_coef=0.01),
    ),
    seq_len=SEQ_LEN,
    sequences=SEQUENCES,
    micro_batch_sequences=1,
    steps=STEPS,
    seed=7,
    optim=OptimConfig(lr=LR, eps=1e-5, weight_decay=0.1, clip_grad_norm=0.5),
    parallel=ParallelConfig(zero=1),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    grad_norms: list[float]
    """Before clipping."""
    weights: dict[str, Tensor]
    """After the last step; of the experts, those of this rank."""


def run_both(rank: int, size: int, eps: list[int]) -> dict[int, tuple[Outcome, Outcome]]:
    """(ours, theirs) for each ep."""
    outcomes = {}
    for ep in eps:
        train = replace(CONFIG.train, micro_batch_tokens=SEQUENCES * SEQ_LEN // size)
        config = replace(CONFIG, parallel=ParallelConfig(ep=ep, zero=1), train=train)
        meshes = build_meshes(parallel_dims(config.parallel, size), "cpu")
        ours = _our_outcome(config, meshes)
        with cuda_on_cpu(), megatron_groups(1, ep):
            outcomes[ep] = ours, _their_outcome(config, size)
    return outcomes


def _samples(step: int, meshes: Meshes) -> MicroBatch:
    """This rank's of the B sequences of a step."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 64, (SEQUENCES, 1), generator=generator)
    ids = (start + 7 * torch.arange(SEQ_LEN + 1)) % 64
    own = ids.chunk(meshes.dims.dp)[meshes.dp_rank]
    return MicroBatch(input_ids_BS=own[:, :-1].contiguous(), target_ids_BS=own[:, 1:].contiguous())


def _our_outcome(config: RunConfig, meshes: Meshes) -> Outcome:
    parallel = build_parallel_model(config, meshes, CPU)
    set_expert_backend(parallel.whole, "loop")
    optimizer = build_optimizer(parallel.whole, config.optim)
    step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(CPU))
    norms = [step([_samples(index, meshes)], LR).grad_norm for index in range(STEPS)]
    ep, at_ep = meshes.dims.ep, meshes.expert.get_local_rank("ep")
    weights = {}
    for name, parameter in parallel.whole.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor().detach()
        weights[name] = whole.chunk(ep)[at_ep].clone() if ".experts." in name else whole
    return Outcome(grad_norms=norms, weights=weights)


class _Loss(nn.Module):
    """The mean loss of this rank's tokens, which is what Megatron averages over data ranks."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        loss_sum, routing = self.model.loss_sum(batch.input_ids_BS, batch.target_ids_BS)
        return loss_sum / batch.target_ids_BS.numel() + routing.total


def _their_outcome(config: RunConfig, size: int) -> Outcome:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    ep = config.parallel.ep
    meshes = build_meshes(parallel_dims(ParallelConfig(ep=ep), size), "cpu")
    unsharded = replace(config, parallel=ParallelConfig(ep=ep))
    model = build_parallel_model(unsharded, meshes, CPU).whole
    set_expert_backend(model, "loop")
    _as_megatron_experts(model)
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=8,
        add_bias_linear=False,
        expert_model_parallel_size=ep,
        moe_router_load_balancing_type="none",
    )
    wrapped: Any = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False),
        _Loss(model.train()),
    )
    optimizer, scheduler = _their_optimizer(wrapped, config.optim)
    norms = []
    for index in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        wrapped(_samples(index, meshes)).backward()
        finalize_model_grads([wrapped])
        updated, norm, _ = optimizer.step()
        assert updated
        scheduler.step(increment=1)
        norms.append(float(norm))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Outcome(grad_norms=norms, weights=weights)


def _as_megatron_experts(model: Transformer) -> None:
    """This rank's experts as plain parameters with Megatron's mark of expert parallelism."""
    for layer in model.moe_layers():
        for name, parameter in list(layer.experts.named_parameters()):
            if isinstance(parameter, DTensor):
                plain = nn.Parameter(parameter.to_local().detach())
                layer.experts.register_parameter(name, plain)
            layer.experts.get_parameter(name).allreduce = False  # type: ignore[attr-defined]


def _their_optimizer(wrapped: Any, optim: OptimConfig) -> tuple[Any, Any]:
    """AdamW by shards, and the schedule, which is what applies their weight decay to matrices only."""
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=LR,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad_norm,
        use_distributed_optimizer=True,
    )
    overrides = get_standard_config_overrides(config)
    optimizer = get_megatron_optimizer(config, [wrapped], overrides, use_gloo_process_groups=False)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=LR,
        max_lr=LR,
        min_lr=LR,
        lr_warmup_steps=0,
        lr_decay_steps=STEPS,
        lr_decay_style="constant",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
