"""What each part of compressing a layer's rows takes, beside the expert products that the layer is there for.

Shapes: T tokens, D model, F expert hidden, E experts, K experts per token, V dimensions of each of H hashes, N = T * K slots.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.interleaved import paired_ratio, time_interleaved
from benchmarks.peers.moe_layer import LayerShape
from benchmarks.results import Cell, Result
from moesys.moe.codecs import LshCodec, TreeCodec
from moesys.moe.experts import Experts
from moesys.ops import tokens_per_expert
from moesys.ops.wire import WireFormat, pack, unpack
from moesys.profile.experts import time_expert_backends

DESCRIPTION = "hashing, means, restoring and few bits beside a layer's expert products (ms, %)"
GPU = True
HASHES, DIMENSIONS = 6, 8
NOISE = 0.5
"""Of a token, beside what it has in common with the seven others of its kind."""


def _shape(t: int, d: int, e: int, k: int, f: int) -> LayerShape:
    return LayerShape(num_experts=e, top_k=k, num_tokens=t, d_model=d, d_expert=f)


SHAPES = {
    "cpu": [
        _shape(512, 256, 16, 2, 192),
        _shape(2048, 512, 16, 2, 384),
        _shape(4096, 1024, 32, 4, 512),
    ],
    "cuda": [_shape(8192, 2048, 64, 8, 768), _shape(32_768, 4096, 64, 4, 1536)],
}
QUICK_SHAPES = [_shape(256, 64, 8, 2, 48)]


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = QUICK_SHAPES if quick else SHAPES[device.type]
    return measure(shapes, device, 1.0 if quick else 15.0, progress)


def measure(
    shapes: Sequence[LayerShape],
    device: torch.device,
    budget_s: float,
    progress: Callable[[str], None],
) -> Result:
    """About `budget_s` seconds for each shape."""
    rows: list[dict[str, Cell]] = []
    for shape in shapes:
        rows.append(_measured(shape, device, budget_s))
        progress(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    last = rows[-1]
    headline = {
        key: float(value)
        for key in ("codec_pct_of_experts", "wire_pct_of_experts", "structured_over_product")
        if isinstance(value := last[key], int | float)
    }
    return Result(headline=headline, rows=rows)


def _measured(shape: LayerShape, device: torch.device, budget_s: float) -> dict[str, Cell]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    x_TD = near_tokens(shape.num_tokens, shape.d_model).to(device, dtype).requires_grad_()
    logits_TE = torch.randn(shape.num_tokens, shape.num_experts, device=device)
    weights_TK, ids_TK = logits_TE.softmax(1).topk(shape.top_k)
    codec = LshCodec(
        d_model=shape.d_model,
        hashes=HASHES,
        dimensions=DIMENSIONS,
    )
    tree = TreeCodec(d_model=shape.d_model)
    code = codec.plan(x_TD.detach(), ids_TK, shape.num_experts)
    rows_CD = code.encode(x_TD)
    out_CD = torch.randn_like(rows_CD).requires_grad_()
    grad_TD, grad_CD = torch.randn_like(x_TD), torch.randn_like(rows_CD)
    maps_DX = torch.randn(shape.d_model, HASHES * DIMENSIONS, device=device, dtype=dtype)
    signs_3D = torch.randint(0, 2, (3, shape.d_model), device=device).to(dtype) * 2 - 1
    format = WireFormat(kind="int8")
    packed_CW = pack(rows_CD, format)

    def decoded() -> None:
        code.decode(out_CD, rows_CD, x_TD, weights_TK.to(dtype)).backward(
            grad_TD, inputs=[out_CD, x_TD], retain_graph=True
        )

    parts: dict[str, Callable[[], object]] = {
        "product": lambda: x_TD.detach() @ maps_DX,
        "structured": lambda: hadamard_maps(x_TD.detach(), signs_3D, HASHES * DIMENSIONS),
        "plan": lambda: codec.plan(x_TD.detach(), ids_TK, shape.num_experts),
        "halving": lambda: tree.plan(x_TD.detach(), ids_TK, shape.num_experts),
        "encode": lambda: code.encode(x_TD).backward(grad_CD, inputs=[x_TD]),
        "decode": decoded,
        "pack": lambda: pack(rows_CD, format),
        "unpack": lambda: unpack(packed_CW, format, shape.d_model, dtype),
        "experts": _experts(shape, ids_TK, device, dtype),
    }
    times_ms = time_interleaved(parts, device=device, budget_s=budget_s)
    ms = {name: statistics.median(times) for name, times in times_ms.items()}
    # Rows are written and read on each of four ways, at most all on this rank.
    codec_ms, wire_ms = ms["plan"] + ms["encode"] + ms["decode"], 4 * (ms["pack"] + ms["unpack"])
    return {
        "shape": f"T={shape.num_tokens} D={shape.d_model} E={shape.num_experts} K={shape.top_k} F={shape.d_expert}",
        "rows_pct": round(100 * rows_CD.shape[0] / ids_TK.numel(), 1),
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        "codec_pct_of_experts": round(100 * codec_ms / ms["experts"], 2),
        "wire_pct_of_experts": round(100 * wire_ms / ms["experts"], 2),
        "structured_over_product": round(
            paired_ratio(times_ms["structured"], times_ms["product"]), 2
        ),
    }


def _experts(
    shape: LayerShape, ids_TK: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward and backward of the experts on every slot's own row, on the fastest backend."""
    experts = Experts(shape.num_experts, shape.d_model, shape.d_expert).to(device, dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    experts.backend = time_expert_backends(
        num_rows=ids_TK.numel(),
        num_experts=shape.num_experts,
        d_model=shape.d_model,
        d_expert=shape.d_expert,
        dtype=dtype,
        device=device,
    ).fastest
    counts_E = tokens_per_expert(ids_TK, shape.num_experts)
    rows_ND = torch.randn(ids_TK.numel(), shape.d_model, device=device, dtype=dtype)
    rows_ND.requires_grad_()
    grad_ND = torch.randn_like(rows_ND)
    return lambda: experts(rows_ND, counts_E).backward(grad_ND)


def near_tokens(num_tokens: int, d_model: int) -> Tensor:
    """Eight of each kind: what they have in common, and noise."""
    kinds = torch.randn(-(-num_tokens // 8), d_model)
    common_TD = kinds.repeat(8, 1)[:num_tokens]
    return common_TD + NOISE * torch.randn(num_tokens, d_model)


def hadamard_maps(x_TD: Tensor, signs_3D: Tensor, num_maps: int) -> Tensor:
    """What costs T D log D additions in the place of a product's T D maps: three times random signs and a Hadamard transform, an
    orthogonal map like a random one (1509.02897, sec. 5), of which the first numbers are kept. D a power of two."""
    for signs_D in signs_3D:
        x_TD = _hadamard(x_TD * signs_D)
    return x_TD[:, :num_maps]


def _hadamard(x_TD: Tensor) -> Tensor:
    """Orthonormal, the fast way: log2 D rounds of sums and differences."""
    num_tokens, d = x_TD.shape
    half = 1
    while half < d:
        first, second = x_TD.view(num_tokens, d // (2 * half), 2, half).unbind(2)
        x_TD = torch.stack([first + second, first - second], dim=2).view(num_tokens, d)
        half *= 2
    return x_TD / math.sqrt(d)
