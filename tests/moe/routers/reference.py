"""Every router once more, in fp64 and one token at a time, written from the papers' formulas.

A reference gets the router's parameters by name and one sequence, and returns its logits and, for each token, the
weight of each expert that serves it. Shapes: T tokens, D model, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """All fp64 and in the graph of the parameters."""

    logits_TE: Tensor
    weights: list[dict[int, Tensor]]
    """Of each token, by expert."""
    probs_TE: Tensor


def best(values: Sequence[float], how_many: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:how_many]


def top_k(
    logits_TE: Tensor,
    k: int,
    *,
    score_function: str = "softmax",
    normalize_weights: bool = True,
    scaling_factor: float = 1.0,
    bias: Sequence[float] | None = None,
    groups: tuple[int, int, int] | None = None,
) -> Expected:
    """`groups`: how many there are, how many a token uses, how many scores make a group's."""
    weights, probs = [], []
    for logits in logits_TE:
        if score_function == "softmax":
            scores = torch.stack([x.exp() for x in logits])
            scores = scores / scores.sum()
            probs.append(scores)
        else:
            scores = torch.stack([1 / (1 + (-x).exp()) for x in logits])
            probs.append(scores / scores.sum())
        biased = [s + b for s, b in zip(scores.tolist(), bias or [0.0] * len(logits), strict=True)]
        if groups is not None:
            biased = _only_groups(biased, *groups)
        chosen = best(biased, k)
        total = sum(scores[e] for e in chosen) if normalize_weights else 1.0
        weights.append({e: scores[e] / total * scaling_factor for e in chosen})
    return Expected(logits_TE=logits_TE, weights=weights, probs_TE=_stacked(probs, logits_TE))


def _only_groups(scores: list[float], number: int, used: int, best_scores: int) -> list[float]:
    size = len(scores) // number
    of_group = [
        sum(sorted(scores[g * size : (g + 1) * size])[-best_scores:]) for g in range(number)
    ]
    open_groups = best(of_group, used)
    return [s if e // size in open_groups else -math.inf for e, s in enumerate(scores)]


def linear(p: Parameters, x_TD: Tensor) -> Tensor:
    return _stacked([torch.stack([x @ w for w in p["weight"]]) for x in x_TD], x_TD, p["weight"])


def cosine(p: Parameters, x_TD: Tensor, temperature: float) -> Tensor:
    tau = temperature * (-p["log_scale"][0]).exp()
    rows = []
    for x in x_TD:
        projected = p["projection"] @ x
        rows.append(
            torch.stack([projected @ e / projected.norm() / e.norm() / tau for e in p["weight"]])
        )
    return _stacked(rows, x_TD, p["weight"])


def recurrent(
    p: Parameters, gru: Parameters, x_TD: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits and the next state."""
    width = len(p["projection"])
    matrices = [gru[name].split(width) for name in ("input_weight", "state_weight")]
    (w_r, w_z, w_n), (u_r, u_z, u_n) = matrices
    states, rows = [], []
    for t, x in enumerate(x_TD):
        h = torch.zeros(width, dtype=x.dtype) if state is None else state[t]
        v = p["projection"] @ x
        r = 1 / (1 + (-(w_r @ v + u_r @ h)).exp())
        z = 1 / (1 + (-(w_z @ v + u_z @ h)).exp())
        n = (w_n @ v + r * (u_n @ h)).tanh()
        h = n - z * n + z * h
        states.append(h)
        rows.append(p["weight"] @ h)
    return _stacked(rows, x_TD, p["weight"]), torch.stack(states) if states else x_TD.new_zeros(
        0, width
    )


def expert_choice(p: Parameters, x_TD: Tensor, k: int, scaling_factor: float = 1.0) -> Expected:
    logits_TE = linear(p, x_TD)
    probs_TE = logits_TE.softmax(-1)
    num_tokens, num_experts = logits_TE.shape
    how_many = min(num_tokens, math.ceil(num_tokens * k / num_experts))
    weights: list[dict[int, Tensor]] = [{} for _ in x_TD]
    for e in range(num_experts):
        for t in best(probs_TE[:, e].tolist(), how_many):
            weights[t][e] = probs_TE[t, e] * scaling_factor
    return Expected(logits_TE=logits_TE, weights=weights, probs_TE=probs_TE)


def relu(p: Parameters, x_TD: Tensor) -> Expected:
    logits_TE = linear(p, x_TD)
    weights = [{e: x for e, x in enumerate(row) if x > 0} for row in logits_TE]
    probs = []
    for row in logits_TE:
        total = sum(x for x in row if x > 0)
        even = torch.full_like(row, 1 / len(row))
        probs.append(even if total == 0 else row.clamp(min=0) / total)
    return Expected(logits_TE=logits_TE, weights=weights, probs_TE=_stacked(probs, logits_TE))


def relu_l1(expected: Expected, f: Sequence[float], coefficient: float) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for row in expected.weights:
        loss = loss + sum(f[e] * weight for e, weight in row.items())
    return coefficient * loss / len(expected.weights)


def soft(p: Parameters, x_SD: Tensor, experts, slots_per_expert: int) -> Tensor:
    """y of one sequence, slot by slot; `experts[e]` is a function of a row."""
    scale = p["log_scale"][0].exp()
    logits = torch.stack(
        [torch.stack([x / x.norm() @ (scale * phi / phi.norm()) for phi in p["phi"]]) for x in x_SD]
    )
    slots = []
    for n in range(len(p["phi"])):
        shares = logits[:, n].exp() / logits[:, n].exp().sum()
        slots.append(
            experts[n // slots_per_expert](sum(s * x for s, x in zip(shares, x_SD, strict=True)))
        )
    rows = []
    for row in logits:
        shares = row.exp() / row.exp().sum()
        rows.append(sum(s * y for s, y in zip(shares, slots, strict=True)))
    return torch.stack(rows)


def _stacked(rows: Sequence[Tensor], like: Tensor, weight: Tensor | None = None) -> Tensor:
    """[T, E], also for no rows."""
    width = like.shape[1] if weight is None else len(weight)
    return torch.stack(list(rows)) if rows else like.new_zeros(0, width)
