"""How fast the ops of moesys are, forward and backward, beside the same mathematics in torch.

The peer is what one writes without them: indexing, scatter by autograd, chunk + silu + product.
Shapes: T tokens, K experts per token, N rows, D model, F expert hidden (here D), E experts.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.interleaved import paired_ratio, synchronize, time_interleaved
from benchmarks.results import Result
from moesys.ops import expert_order, library, permute, reference, swiglu, unpermute
from tests.ops.cases import TIMED, Case, inputs

DESCRIPTION = "expert order, permute, unpermute and SwiGLU against plain torch"
GPU = True


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    """Each op on each case of tests/ops/cases.py, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not library.runs_on(torch.empty(0, device=device)):
        raise ValueError(f"nothing to measure: {library.status()}")
    rows = []
    for case in TIMED[:1] if quick else TIMED:
        for op, (ours, plain, moved_bytes) in contestants(case, device).items():
            times_ms = time_interleaved(
                {"ours": ours, "plain": plain}, device=device, budget_s=0.2 if quick else 3.0
            )
            rows.append(
                {
                    "op": op,
                    "case": str(case),
                    "ours_ms": statistics.median(times_ms["ours"]),
                    "plain_torch_ms": statistics.median(times_ms["plain"]),
                    "speedup_ratio": paired_ratio(times_ms["plain"], times_ms["ours"]),
                    "ours_gb_per_s": moved_bytes / statistics.median(times_ms["ours"]) / 1e6,
                }
            )
            progress(f"{op} {case}: {rows[-1]['speedup_ratio']:.2f} times plain torch")
    ratios = {
        op: [r["speedup_ratio"] for r in rows if r["op"] == op] for op in {r["op"] for r in rows}
    }
    headline = {f"{op}_least_speedup_ratio": min(ratios[op]) for op in sorted(ratios)}
    return Result(headline=headline, rows=rows)


Contest = tuple[Callable[[], None], Callable[[], None], int]


def contestants(case: Case, device: torch.device) -> dict[str, Contest]:
    """For each op: ours, plain torch, and the bytes that must move at least (each tensor once)."""
    data = inputs(case, str(device))
    ids_TK, x_TD, weights_TK = data.topk_ids_TK, data.x_TD, data.weights_TK
    row_of_slot_TK, slot_of_row_N, _ = expert_order(ids_TK, case.num_experts)
    token_of_row_N = slot_of_row_N // case.top_k
    rows_ND = permute(x_TD, slot_of_row_N, row_of_slot_TK)
    gate_up_N2F = torch.randn(rows_ND.shape[0], 2 * case.d_model, device=device).to(rows_ND)
    token_bytes, row_bytes = (t.numel() * t.element_size() for t in (x_TD, rows_ND))

    def plain_unpermute(rows: Tensor, weights: Tensor) -> Tensor:
        weight_N1 = weights.flatten()[slot_of_row_N, None]
        return torch.zeros_like(x_TD).index_add(0, token_of_row_N, rows * weight_N1)

    def plain_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    ops = {
        "permute": (
            lambda x: permute(x, slot_of_row_N, row_of_slot_TK),
            lambda x: x[token_of_row_N],
            [x_TD],
            (token_bytes + row_bytes, token_bytes + row_bytes),
        ),
        "unpermute": (
            lambda rows, weights: unpermute(rows, weights, row_of_slot_TK),
            plain_unpermute,
            [rows_ND, weights_TK],
            (token_bytes + row_bytes, token_bytes + 2 * row_bytes),
        ),
        "swiglu": (swiglu, plain_swiglu, [gate_up_N2F], (3 * row_bytes, 5 * row_bytes)),
    }
    contests: dict[str, Contest] = {
        "expert_order": (
            _call(expert_order, ids_TK, case.num_experts),
            _call(reference.expert_order, ids_TK, case.num_experts),
            3 * 8 * ids_TK.numel(),
        )
    }
    for name, (ours, plain, leaves, (forward_bytes, backward_bytes)) in ops.items():
        contests[f"{name}_forward"] = (_call(ours, *leaves), _call(plain, *leaves), forward_bytes)
        contests[f"{name}_backward"] = (
            _backward(ours, leaves),
            _backward(plain, leaves),
            backward_bytes,
        )
    synchronize(device)
    return contests


def _call(op: Callable, *arguments: Tensor | int) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            op(*arguments)

    return call


def _backward(op: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(*leaves)
    grad = torch.randn_like(out)
    return lambda: _discard(torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _discard(_: object) -> None:
    """Let results go inside the timed call, as a training step does."""
