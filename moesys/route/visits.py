"""Sends texts through a checkpoint's model and writes down what its routers decide.

Shapes: T tokens of a text, E experts, K slots of a token, M MoE layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint.folder import checkpoints_at, step_of
from moesys.checkpoint.store import load
from moesys.checkpoint.weights import WEIGHTS, weight_tensors
from moesys.config.compose import load_resolved
from moesys.config.schema import RunConfig
from moesys.data.tokenizer import tokenizer_of
from moesys.models.transformer import Transformer
from moesys.moe.layer import MoELayer
from moesys.moe.listening import Listening
from moesys.moe.routing import RoutingResult
from moesys.moe.similarity import layer_similarity
from moesys.moe.tokens import Known
from moesys.moe.visits import slots
from moesys.parallelize.build import build_model
from moesys.parallelize.expert_backend import set_expert_backend


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Of one text."""

    source: str
    """Its name."""
    tokens: list[str]
    """The text of each of T tokens; "" for a later part of one character."""
    experts: list[list[list[tuple[int, float]]]]
    """M x T: the experts of a token with their weights, the heaviest first."""
    load_ME: list[list[int]]
    """Slots; layers may have different numbers of experts."""
    entropy_M: list[float]
    """Of a token's routing probabilities, nats, mean over tokens."""


def load_model(run_dir: Path, step: int | None = None) -> tuple[RunConfig, Transformer, int]:
    """The run's configuration, and its model at `step` (None = the newest checkpoint) on the CPU, with that step.

    Raises ValueError naming what is missing.
    """
    config = load_resolved(run_dir / "config.yaml")
    found = {step_of(path): path for path in checkpoints_at(run_dir)}
    if step is not None and step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise ValueError(f"{run_dir} has no checkpoint {step}: there are {steps}")
    return config, *model_of(config, found[max(found) if step is None else step])


def model_of(config: RunConfig, path: Path) -> tuple[Transformer, int]:
    """The model in the checkpoint `path`, on the CPU, and its step."""
    model = build_model(config.model, None, torch.device("cpu"), seed=0)
    set_expert_backend(model, "loop")
    done = load(path, weight_tensors(model), under=WEIGHTS)
    return model.eval(), done.step


@torch.no_grad()
def visits(
    config: RunConfig, model: Transformer, texts: Mapping[str, str], max_tokens: int
) -> list[Visits]:
    """Of the first `max_tokens` tokens of each text, in sequences of data.seq_len."""
    tokenizer = tokenizer_of(config.data)
    found = []
    for source, text in texts.items():
        encoding = tokenizer.encode(text)
        ids = encoding.ids[:max_tokens]
        if not ids:
            raise ValueError(f"{source} has no token")
        layers = _decisions(model, ids, config.data.seq_len)
        spans = [text[a:b] for a, b in encoding.offsets[:max_tokens]]
        found.append(
            Visits(
                source=source,
                tokens=_without_repeats(spans, encoding.offsets),
                experts=[_of_tokens(parts, config.model.moe.top_k) for parts in layers],
                load_ME=[_load(parts) for parts in layers],
                entropy_M=[_entropy(parts) for parts in layers],
            )
        )
    return found


def _decisions(model: Transformer, ids: Sequence[int], seq_len: int) -> list[list[RoutingResult]]:
    """Of each MoE layer, one result for each sequence."""
    made: list[list[RoutingResult]] = [[] for _ in model.decoder_moe_layers()]

    def hear(at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        made[at].append(routed)

    with Listening(dict(enumerate(model.decoder_moe_layers())), hear):
        for first in range(0, len(ids), seq_len):
            model.logits(torch.tensor([ids[first : first + seq_len]]))
    return made


def _of_tokens(parts: Sequence[RoutingResult], top_k: int) -> list[list[tuple[int, float]]]:
    found = []
    for part in parts:
        ids_TK, weights_TK = part.topk_ids_TK, part.topk_weights_TK
        if part.blend is not None:  # all of them: the largest shares
            weights_TK, ids_TK = part.probs_TE.topk(top_k, dim=-1)
        for ids, weights in zip(ids_TK.tolist(), weights_TK.tolist(), strict=True):
            chosen = [(e, round(w, 4)) for e, w in zip(ids, weights, strict=True) if e >= 0]
            found.append(sorted(chosen, key=lambda one: -one[1]))
    return found


def _load(parts: Sequence[RoutingResult]) -> list[int]:
    return torch.stack([slots(part) for part in parts]).sum(0).tolist()


def _entropy(parts: Sequence[RoutingResult]) -> float:
    probs_TE = torch.cat([part.probs_TE for part in parts])
    return torch.special.entr(probs_TE).sum(-1).mean().item()


def _without_repeats(spans: list[str], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Tokens that are parts of one character have its span each."""
    return ["" if at and offsets[at] == offsets[at - 1] else span for at, span in enumerate(spans)]


def expert_similarity(model: Transformer) -> list[float]:
    """Of each MoE layer the mean cosine between the weights of two experts: 0 = unrelated, 1 = copies."""
    return [layer_similarity(layer.experts).item() for layer in model.decoder_moe_layers()]
