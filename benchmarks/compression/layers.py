"""One MoE layer of a trained model, forward and backward, beside DeepSpeed's with the same weights and tokens, on every rank of a fabric.

Rank 0 prints a line of JSON for every contestant and round. All take turns; a turn ends when all ranks are done.

Shapes: T tokens of this rank, D model.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.compression.speed import DEEPSPEED
from benchmarks.interleaved import relative_error
from benchmarks.peers.deepspeed_layer import DeepSpeedLayer
from benchmarks.peers.moe_layer import LayerShape, LayerWeights
from benchmarks.variants import Variant, build_variants
from moesys.data.loader import TokenLoader
from moesys.moe.layer import MoELayer
from moesys.ops.shard import local_tensor
from moesys.parallel.bootstrap import process_group

TOLERANCE = 1e-4
"""Largest relative error between DeepSpeed's output and ours, uncompressed."""


def middle_layer(variant: Variant) -> MoELayer:
    """Of its MoE layers."""
    layers = variant.run.model.moe_layers()
    return layers[len(layers) // 2]


def without_shared(layer: MoELayer) -> MoELayer:
    """What every token sees DeepSpeed's layer has not."""
    layer.shared = None
    return layer


def tokens_of(variant: Variant) -> Tensor:
    """What the layer gets of this rank's first micro-batch, [T, D]."""
    seen: list[Tensor] = []
    hook = middle_layer(variant).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    loader = variant.run.loader
    assert isinstance(loader, TokenLoader)
    batch = loader.next_step()[0]
    with torch.no_grad():
        variant.run.parallel.whole(batch.input_ids_BS)
    hook.remove()
    return seen[0]


def deepspeed_of(layer: MoELayer, num_tokens: int, ep_size: int) -> DeepSpeedLayer:
    """With copies of this rank's experts."""
    config, (experts,) = layer.config, layer.experts.classes()
    gate_up, down = map(local_tensor, (experts.gate_up, experts.down))
    router: Any = layer.router
    shape = LayerShape(
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_tokens=num_tokens,
        d_model=layer.d_model,
        d_expert=config.d_expert,
    )
    weights = LayerWeights(
        router_ED=router.weight.detach(),
        gate_up_E2FD=gate_up.detach().flatten(1, 2),
        down_EDF=down.detach(),
    )
    return DeepSpeedLayer(shape, weights, ep_size)


def main(variants: dict[str, list[str]], rounds: int) -> None:
    """The first variant compresses nothing."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = build_variants(variants, process, Variant)
        plain = built[0]
        x_TD, seq_len = tokens_of(plain).requires_grad_(), plain.run.config.data.seq_len
        grad_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(process.rank))
        layers = {v.name: without_shared(middle_layer(v)).train() for v in built}
        peer = deepspeed_of(layers[plain.name], x_TD.shape[0], process.world_size)
        turns: dict[str, Callable[[], Tensor]] = {
            name: (lambda layer=layer: layer(x_TD, seq_len=seq_len)[0])
            for name, layer in layers.items()
        }
        turns[DEEPSPEED] = lambda: peer.forward(x_TD)
        with torch.no_grad():
            error = relative_error(turns[DEEPSPEED](), turns[plain.name]())
        if error > TOLERANCE:
            raise RuntimeError(f"DeepSpeed's layer computes something else: off by {error:.1e}")
        for number in range(-1, rounds):
            for name, forward in turns.items():
                dist.barrier()
                began = time.perf_counter()
                forward().backward(grad_TD)
                dist.barrier()
                layer_ms = (time.perf_counter() - began) * 1e3
                if process.rank == 0 and number >= 0:
                    print(json.dumps({"variant": name, "layer_ms": layer_ms}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
