"""One MoE layer in megatron-core and in ours, with the same weights on the same tokens: what the ranks run.

Shapes: B samples of S tokens on each data rank, N tokens of all ranks, D model, F hidden of an expert, E experts.

Each rank puts its results at their place in whole tensors of zeros, which are summed over the ranks: outputs and input
gradients by token, experts' gradients by expert. So both systems give whole tensors, whoever computed what.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesys.config.schema import BalanceConfig, ComponentConfig, MoEConfig
from moesys.moe.balance import RoutingLosses, updated_bias
from moesys.moe.layer import MoELayer
from moesys.ops.shard import local_tensor
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.experts import shard_experts
from tests.oracles.shim import cuda_on_cpu

B, S, D, F_HIDDEN, E, K = 2, 8, 16, 12, 8, 2
AUX_COEF, Z_COEF, BIAS_RATE = 0.5, 0.1, 0.05

LEVELS = {
    "micro": ("aux_loss", "load_balancing_loss"),
    "sequence": ("seq_aux_loss", "seq_load_balancing_loss"),
    "global": ("global_aux_loss", "global_load_balancing_loss"),
}
"""Our level of the balance loss: Megatron's type of balancing, and the name under which it logs the loss."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and options, in our words."""

    tp: int = 1
    ep: int = 1
    level: Literal["micro", "sequence", "global"] | None = None
    """None = without balance and z-loss."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    scaling_factor: float = 1.0
    num_shared_experts: int = 0
    capacity_factor: float | None = None
    moves_bias: bool = False
    start_bias: float = 0.0
    """Selection bias of expert 0 at the start."""
    steps: int = 1
    """Forward and backward passes, gradients accumulated; the bias moves after each."""


@dataclass(kw_only=True)
class Outcome:
    """What a system computed, whole."""

    y_ND: Tensor
    """Of the last step."""
    dx_ND: Tensor
    gradients: dict[str, Tensor]
    """Summed over tokens of all ranks and steps, under our names and shapes."""
    loads: list[list[int]] = field(default_factory=list)
    """Slots per expert that were computed, for each step."""
    balance: float
    """Mean over ranks of the last step's balance loss, without coefficient, in our convention."""
    z: float
    biases: list[Tensor] = field(default_factory=list)


def run_cases(rank: int, size: int, cases: dict[str, Case]) -> dict[str, tuple[Outcome, Outcome]]:
    """(ours, theirs) of every case; Megatron is imported once for all."""
    outcomes = {}
    for tp, ep in sorted({(case.tp, case.ep) for case in cases.values()}):
        of_layout = {name: c for name, c in cases.items() if (c.tp, c.ep) == (tp, ep)}
        meshes = build_meshes(ParallelDims(world_size=size, tp=tp, ep=ep), "cpu")
        ours = {name: _our_outcome(case, meshes) for name, case in of_layout.items()}
        with cuda_on_cpu(), megatron_groups(tp, ep):
            for name, case in of_layout.items():
                outcomes[name] = ours[name], _their_outcome(case, size)
    return outcomes


@contextmanager
def megatron_groups(tp: int, ep: int) -> Iterator[None]:
    """Megatron's process groups of a layout."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    yield
    parallel_state.destroy_model_parallel()


def weights_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) * sizes[-1] ** -0.5

    weights = {
        "router.weight": 2 * normal(E, D),
        "experts.gate_up": normal(E, 2, F_HIDDEN, D),
        "experts.down": normal(E, D, F_HIDDEN),
    }
    if case.num_shared_experts:
        width = case.num_shared_experts * F_HIDDEN
        weights |= {"shared.gate_up": normal(2, width, D), "shared.down": normal(D, width)}
    return weights


def tokens_of(step: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """All ranks' inputs, and the gradient of a loss by their outputs; samples one after the other."""
    generator = torch.Generator().manual_seed(100 + step)
    x_ND, g_ND = (torch.randn(num_tokens, D, generator=generator) for _ in range(2))
    return x_ND + 0.5, g_ND  # off centre, so that load is uneven


def _summed(shape: torch.Size, *parts: tuple[Any, Tensor]) -> Tensor:
    whole = torch.zeros(shape)
    for place, part in parts:
        whole[place] += part
    dist.all_reduce(whole)
    return whole


def _mean_over_ranks(value: float) -> float:
    mean = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


# --- ours -----------------------------------------------------------------------------------


def _our_config(case: Case, size: int) -> MoEConfig:
    """Megatron's coefficients in our convention, where every rank's loss is a mean over its own tokens.

    Megatron divides both losses by the ranks over which f_i is counted: tp for a micro-batch or a sequence, all for
    the global level; and z by tp. So its coefficients c are ours times that number of ranks.
    """
    balance = BalanceConfig(bias_update_rate=BIAS_RATE if case.moves_bias else 0.0)
    if case.level is not None:
        coefficient = {f"{case.level}_loss_coef": AUX_COEF / _ranks_of_level(case, size)}
        balance = replace(balance, z_loss_coef=Z_COEF / case.tp, **coefficient)
    options = {
        "score_function": case.score_function,
        "normalize_weights": case.normalize_weights,
        "scaling_factor": case.scaling_factor,
    }
    return MoEConfig(
        num_experts=E,
        top_k=K,
        d_expert=F_HIDDEN,
        num_shared_experts=case.num_shared_experts,
        router=ComponentConfig(target="moesys.moe.routers.TopKRouter", options=options),
        balance=balance,
        capacity_factor=case.capacity_factor,
    )


def _ranks_of_level(case: Case, size: int) -> int:
    return size if case.level == "global" else case.tp


def _our_layer(case: Case, meshes: Meshes) -> MoELayer:
    layer = MoELayer(_our_config(case, meshes.dims.world_size), D)
    with torch.no_grad():
        for name, weight in weights_of(case).items():
            layer.get_parameter(name).copy_(weight)
        layer.router.get_buffer("selection_bias_E")[0] = case.start_bias
    shard_experts(layer, meshes)
    layer.experts.backend = "loop"
    return layer


def _our_outcome(case: Case, meshes: Meshes) -> Outcome:
    dims = meshes.dims
    layer = _our_layer(case, meshes)
    num_tokens = dims.dp * B * S
    shape_ND = torch.Size((num_tokens, D))
    at_tp = meshes.dense.get_local_rank("tp")
    own = torch.arange(num_tokens).chunk(dims.dp)[meshes.dp_rank].chunk(case.tp)[at_tp]
    loads, biases = [], []

    def forward_backward(step: int) -> tuple[Tensor, Tensor, RoutingLosses]:
        x_ND, g_ND = tokens_of(step, num_tokens)
        x_TD = x_ND[own].requires_grad_()
        y_TD, losses, _ = layer(x_TD, None, S)
        ((y_TD * g_ND[own]).sum() + losses.total).backward()
        load_X = layer.load.take(torch.device("cpu"))
        dist.all_reduce(load_X)
        loads.append(load_X.tolist())
        if case.moves_bias:
            bias_E = layer.router.get_buffer("selection_bias_E")
            bias_E.copy_(updated_bias(bias_E, load_X[:-1], BIAS_RATE))
            biases.append(bias_E.clone())
        return x_TD, y_TD, losses

    x_TD, y_TD, losses = [forward_backward(step) for step in range(case.steps)][-1]
    first = meshes.expert.get_local_rank("ep") * (E // case.ep)
    gradients = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        place = slice(first, first + E // case.ep) if name.startswith("experts.") else slice(None)
        gradients[name] = _summed(parameter.shape, (place, local_tensor(parameter.grad)))
    assert x_TD.grad is not None
    return Outcome(
        y_ND=_summed(shape_ND, (own, y_TD.detach())),
        dx_ND=_summed(shape_ND, (own, x_TD.grad)),
        gradients=gradients,
        loads=loads,
        balance=_mean_over_ranks(losses.balance.item()),
        z=_mean_over_ranks(losses.z.item()),
        biases=biases,
    )


# --- theirs ---------------------------------------------------------------------------------


def _their_config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options: dict[str, Any] = {}
    if case.level is not None:
        options |= {
            "moe_router_load_balancing_type": [LEVELS[case.level][0]],
            "moe_aux_loss_coeff": [AUX_COEF],
            "moe_z_loss_coeff": Z_COEF,
        }
    else:
        options["moe_router_load_balancing_type"] = "none"
    if case.num_shared_experts:
        options["moe_shared_expert_intermediate_size"] = case.num_shared_experts * F_HIDDEN
    if case.capacity_factor is not None:
        options["moe_expert_capacity_factor"] = case.capacity_factor
    if case.moves_bias or case.start_bias:
        options["moe_router_enable_expert_bias"] = True
        options["moe_router_bias_update_rate"] = BIAS_RATE
    if case.scaling_factor != 1.0:
        options["moe_router_topk_scaling_factor"] = case.scaling_factor
    return TransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=4,
        ffn_hidden_size=F_HIDDEN,
        moe_ffn_hidden_size=F_HIDDEN,
        num_moe_experts=E,
        moe_router_topk=K,
        moe_router_score_function=case.score_function,
        moe_router_pre_softmax=case.score_function == "softmax" and not case.normalize_weights,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.tp > 1,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1,
        **options,
    )


def _their_places(case: Case) -> dict[str, tuple[str, Any]]:
    """Each of their parameters on this rank: our name, and the index of it in our whole tensor."""
    from megatron.core import parallel_state

    num_local = E // case.ep
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    width = case.num_shared_experts * F_HIDDEN // case.tp
    at_tp = parallel_state.get_tensor_model_parallel_rank()
    part = slice(at_tp * width, (at_tp + 1) * width)
    places: dict[str, tuple[str, Any]] = {"router.weight": ("router.weight", slice(None))}
    for i in range(num_local):
        their_expert = f"experts.local_experts.{i}"
        places[f"{their_expert}.linear_fc1.weight"] = "experts.gate_up", first + i
        places[f"{their_expert}.linear_fc2.weight"] = "experts.down", first + i
    if case.num_shared_experts:
        places["shared_experts.linear_fc1.weight"] = "shared.gate_up", (slice(None), part)
        places["shared_experts.linear_fc2.weight"] = "shared.down", (slice(None), part)
    return places


def _their_layer(case: Case) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # a name that is only there with Transformer Engine
    spec: Any = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
    layer: Any = spec.module(_their_config(case), spec.submodules)
    layer.set_layer_number(1)
    weights, places = weights_of(case), _their_places(case)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            ours, place = places.pop(name)
            parameter.copy_(weights[ours][place].reshape(parameter.shape))
        if case.start_bias:
            layer.router.expert_bias[0] = case.start_bias
    assert not places, places
    return layer


def _their_outcome(case: Case, size: int) -> Outcome:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    layer = _their_layer(case)
    maps: list[Tensor] = []
    layer.router.register_forward_hook(lambda _, __, routed: maps.append(routed[1]))
    dp, at_dp = size // case.tp, parallel_state.get_data_parallel_rank()
    at_tp = parallel_state.get_tensor_model_parallel_rank()
    num_tokens = dp * B * S
    shape_ND = torch.Size((num_tokens, D))
    # [S, B, D], and sequence parallelism shares out the positions of every sample.
    own_SB = torch.arange(num_tokens).view(dp, B, S)[at_dp].T.chunk(case.tp)[at_tp]
    loads, biases = [], []

    def forward_backward(step: int) -> tuple[Tensor, Tensor]:
        x_ND, g_ND = tokens_of(step, num_tokens)
        x_SBD = x_ND[own_SB].contiguous().requires_grad_()
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        y_SBD, _ = layer(x_SBD)
        (y_SBD * g_ND[own_SB].contiguous()).sum().backward()
        load_E = maps[-1].sum(0)
        dist.all_reduce(load_E)
        loads.append(load_E.tolist())
        if case.moves_bias:
            biases.append(_move_their_bias(layer.router))
        return x_SBD, y_SBD

    x_SBD, y_SBD = [forward_backward(step) for step in range(case.steps)][-1]
    gradients = _their_gradients(case, layer)
    balance = z = 0.0
    if case.level is not None:
        logged = moe_utils.get_moe_layer_wise_logging_tracker()
        balance = logged[LEVELS[case.level][1]]["values"].item() * _ranks_of_level(case, size)
        z = logged["z_loss"]["values"].item()
    assert x_SBD.grad is not None
    return Outcome(
        y_ND=_summed(shape_ND, (own_SB, y_SBD.detach())),
        dx_ND=_summed(shape_ND, (own_SB, x_SBD.grad)),
        gradients=gradients,
        loads=loads,
        balance=_mean_over_ranks(balance),
        z=_mean_over_ranks(z),
        biases=biases,
    )


def _move_their_bias(router: Any) -> Tensor:
    """As its finalize_model_grads does after each optimizer step."""
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    counts_E, bias_E = router.local_tokens_per_expert, router.expert_bias
    bias_E.copy_(get_updated_expert_bias(counts_E, bias_E, BIAS_RATE))
    counts_E.zero_()
    return bias_E.clone()


def _their_gradients(case: Case, layer: Any) -> dict[str, Tensor]:
    parts: dict[str, list[tuple[Any, Tensor]]] = {}
    weights, places = weights_of(case), _their_places(case)
    for name, parameter in layer.named_parameters():
        ours, place = places[name]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts.setdefault(ours, []).append((place, grad.reshape(weights[ours][place].shape)))
    return {name: _summed(weights[name].shape, *part) for name, part in parts.items()}
