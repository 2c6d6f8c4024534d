"""Several runs made one: experts side by side, everything else averaged, or shared from the start.

Shapes: D model, F hidden width, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch

from moesys.checkpoint.errors import itemize
from moesys.checkpoint.region import Region
from moesys.checkpoint.shards import ShardReader
from moesys.checkpoint.weights import WEIGHTS
from moesys.config.schema import ModelConfig, MoEConfig
from moesys.grow.attention import GATE, attentions
from moesys.grow.change import Fill, NewTensor, Shapes, Source, mean_of, rows_of, zeros
from moesys.grow.experts import experts_by_layer, keep_experts, layer_of, rowed, with_experts
from moesys.grow.part import Part, refuse_unlike, shapes_of
from moesys.grow.upcycle import TOPK_SOFTMAX, drawn_rows
from moesys.grow.write import Growth

Method = Literal["average", "btx", "bam", "flexolmo"]
Progress = Callable[[int, int], None]


def merge(
    parts: Sequence[Part],
    method: Method,
    *,
    top_k: int | None = None,
    shares_kv: bool = False,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> Growth:
    """One MoE of several runs.

    average: MoEs of one shape. Experts and their rows of the router side by side, the rest averaged (AoE of Z-code M3,
        2109.10465). Its function is none of the parts'.
    btx: dense models grown apart from one seed. Each feed-forward becomes an expert, the rest is averaged, the router
        is new, drawn by `seed` (Branch-Train-Mix, 2403.07816).
    bam: as btx, and each attention becomes an attention expert under a new gate; keys and values are each one's own, or
        averaged with `shares_kv` (BAM, 2408.08274; that shared ones are averaged is our reading).
    flexolmo: MoEs grown apart from the first part, the public one, on data that cannot be shared. What is not an expert or
        its row of the router must be the public part's, bit for bit; the router's rows, which each part has learned or
        was given for its own data, side by side are the router (FlexOlmo, 2507.07024). A part that still has the
        public part's experts, the first ones, brings only what comes after them. No joint training is needed, and a
        part can `leave`.

    `top_k` is the parts' largest unless given (btx, bam: 2). `on_progress(bytes_done, bytes_total)` of what flexolmo compares.

    Raises:
        ValueError: every way in which the parts do not fit, with their files and both values.
        CheckpointError: a damaged part.
    """
    _refuse_names(parts)
    if method in ("btx", "bam"):
        kv = None if method == "btx" else "shared" if shares_kv else "own"
        return _branches(parts, top_k or min(2, len(parts)), kv, seed)
    _refuse_dense(parts, method)
    ignored = ["model.moe.num_experts", "model.moe.experts_by_layer"]
    ignored += ["model.moe.top_k"] if top_k or method == "flexolmo" else []
    refuse_unlike(parts, ignored)
    if any(part.model.moe.num_choices > part.model.moe.num_experts for part in parts):
        raise ValueError("experts without a feed-forward (zero, copy, constant) cannot be merged")
    top_k = top_k or max(part.model.moe.top_k for part in parts)
    numbers = [experts_by_layer(part.model) for part in parts]
    model = with_experts(parts[0].model, _sums(numbers), top_k)
    rows = rowed(parts[0].model, model, parts[0].shapes, shapes_of(model))
    first_own = [[0] * len(numbers[0]) for _ in parts]
    if method == "flexolmo":
        has_public = _with_public(parts, rows, on_progress)
        first_own = [
            numbers[0] if has else first for has, first in zip(has_public, first_own, strict=True)
        ]
        numbers = [
            [n - first for n, first in zip(of_part, own, strict=True)]
            for of_part, own in zip(numbers, first_own, strict=True)
        ]
        model = with_experts(parts[0].model, _sums(numbers), top_k)
    averaged = range(len(parts)) if method == "average" else [0]

    def tensors() -> Iterator[NewTensor]:
        for name, of in shapes_of(model).items():
            if name not in rows:
                yield mean_of(name, of, averaged)
                continue
            place = model.moe_layers.index(layer_of(name))
            ids = [
                (part, name, first_own[part][place] + i)
                for part, of_part in enumerate(numbers)
                for i in range(of_part[place])
            ]
            yield rows_of(name, of.dtype, of.shape[1:], ids)

    origin = _origin(parts, method, numbers)
    return Growth(parts=parts, model=model, tensors=list(tensors()), origin=origin)


def leave(part: Part, name: str, top_k: int | None = None) -> Growth:
    """The merge without the part `name`: bit for bit what merging the others gives.

    Raises:
        ValueError: no such part, or a merge whose other weights remember it.
    """
    origin = part.manifest.state.get("origin") or {}
    if origin.get("method") != "flexolmo":
        raise ValueError(
            f"{part.folder} is no merge by flexolmo: in others the shared weights remember every part"
        )
    names = [one["name"] for one in origin["parts"]]
    if name not in names:
        raise ValueError(f"{part.folder} has no part {name}: it has {', '.join(names)}")
    if name == names[0]:
        raise ValueError(f"{name} is the public part of {part.folder}, which the others stand on")
    kept: list[list[int]] = []
    for place, number in enumerate(experts_by_layer(part.model)):
        ends = [*accumulate(one["experts"][place] for one in origin["parts"])]
        own = origin["parts"][names.index(name)]["experts"][place]
        gone = range(ends[names.index(name)] - own, ends[names.index(name)])
        kept.append([expert for expert in range(number) if expert not in gone])
    top_k = top_k or part.model.moe.top_k
    least = min(map(len, kept))
    if top_k > least:
        raise ValueError(f"--top-k {top_k} must be at most the {least} experts that stay")
    remaining = [one for one in origin["parts"] if one["name"] != name]
    return keep_experts(part, kept, top_k, origin | {"parts": remaining})


def _sums(numbers: Sequence[Sequence[int]]) -> list[int]:
    """Over the parts, of each layer."""
    return [sum(of_layer) for of_layer in zip(*numbers, strict=True)]


def _origin(
    parts: Sequence[Part], method: Method, numbers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How many experts of each MoE layer are from where, in the order of the parts."""
    listed = [
        {"name": part.name, "from": str(part.folder), "experts": [*of_part]}
        for part, of_part in zip(parts, numbers, strict=True)
    ]
    return {"operation": "merge", "method": method, "parts": listed}


def _refuse_names(parts: Sequence[Part]) -> None:
    names = [part.name for part in parts]
    if len(parts) < 2:
        raise ValueError("a merge takes at least two runs")
    if len(set(names)) < len(names):
        raise ValueError(f"parts {', '.join(names)} need names of their own: write NAME=RUN")


def _refuse_dense(parts: Sequence[Part], method: Method) -> None:
    dense = [str(p.run) for p in parts if p.model.num_dense_layers == p.model.num_layers]
    if dense:
        fix = "use --method btx" if method == "average" else "grow it with moesys ckpt upcycle"
        raise ValueError(f"--method {method} merges MoEs, {', '.join(dense)} is dense: {fix}")


def _branches(
    parts: Sequence[Part], top_k: int, kv: Literal["own", "shared"] | None, seed: int
) -> Growth:
    """btx, or bam with keys and values as `kv` says."""
    method = "btx" if kv is None else "bam"
    sparse = [str(p.run) for p in parts if p.model.num_dense_layers < p.model.num_layers]
    if sparse:
        raise ValueError(
            f"--method {method} merges dense models, {', '.join(sparse)} has experts: use --method average"
        )
    refuse_unlike(parts, ["model.moe."])
    first = parts[0].model
    moe = MoEConfig(
        num_experts=len(parts),
        top_k=top_k,
        d_expert=first.d_ffn,
        router=TOPK_SOFTMAX,
        balance=first.moe.balance,
        expert_backend=first.moe.expert_backend,
    )
    model = replace(first, num_dense_layers=0, share_depth="none", moe=moe)
    if kv is not None:
        if first.attention_experts > 1:
            raise ValueError(
                f"--method bam: model.attention_experts is {first.attention_experts} in {parts[0].run}, must be 1: use btx"
            )
        model = replace(model, attention_experts=len(parts), attention_experts_kv=kv)
    new = shapes_of(model)
    return Growth(
        parts=parts,
        model=model,
        tensors=list(_mixed(parts, model, new, seed)),
        origin=_origin(parts, method, [[1] * len(model.moe_layers)] * len(parts)),
    )


def _mixed(
    parts: Sequence[Part], model: ModelConfig, new: Shapes, seed: int
) -> Iterator[NewTensor]:
    for name, of in new.items():
        if parts[0].shapes.get(name) == of:
            yield mean_of(name, of, range(len(parts)))
        elif ".moe.experts." in name:
            dense = name.replace(".moe.experts.", ".ffn.")
            fills = (
                Fill(
                    region=Region(
                        offsets=(e, *(0 for _ in of.shape[1:])), shape=(1, *of.shape[1:])
                    ),
                    sources=(Source(part=e, name=dense, region=Region.whole(of.shape[1:])),),
                )
                for e in range(len(parts))
            )
            yield NewTensor(name=name, dtype=of.dtype, shape=of.shape, fills=tuple(fills))
        elif name in parts[0].shapes:
            yield attentions(name, of, model)
        elif name.endswith((".router.weight", GATE)):
            yield drawn_rows(name, of, model.init_std, seed)
        else:
            yield zeros(name, of)


def _with_public(parts: Sequence[Part], rows: set[str], on_progress: Progress) -> list[bool]:
    """Whether each part still has the public part's experts, the first ones (the public part itself: no).

    Raises ValueError where what is shared differs, or nothing is a part's own.
    """
    public = parts[0]
    experts = {name for name in rows if ".moe.experts." in name}
    # A selection bias moves without a gradient; the public part's is taken.
    of_routers = {name for name in rows - experts if not name.endswith(".selection_bias_E")}
    found, problems = [False], list[str]()
    part_bytes = sum(public.manifest.tensors[name].num_bytes for name in public.shapes)
    with ExitStack() as opened:
        read = [opened.enter_context(ShardReader(p.folder, p.manifest)) for p in parts]
        for part, reader in zip(parts[1:], read[1:], strict=True):
            has_public = all(_equal(read[0], reader, name) for name in sorted(experts))
            found.append(has_public)
            compared = (public.shapes.keys() - rows) | (of_routers if has_public else set())
            differing = [name for name in sorted(compared) if not _equal(read[0], reader, name)]
            if differing:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                names = ", ".join(name.removeprefix(WEIGHTS) for name in differing[:3])
                problems.append(f"{names}{more} of {part.folder} are not those of {public.folder}")
            if has_public and experts_by_layer(part.model) == experts_by_layer(public.model):
                problems.append(f"{part.folder} has no expert of its own")
            on_progress(len(found[1:]) * part_bytes, len(parts[1:]) * part_bytes)
    if problems:
        raise ValueError(
            itemize("parts of a flexolmo merge share all but experts and their rows", problems)
            + "\nTrain each part with optim.frozen_experts, or merge with --method average"
        )
    return found


def _equal(public: ShardReader, reader: ShardReader, name: str) -> bool:
    """Whether all of the public part's tensor is, bit for bit, the beginning of the other's. A chunk at a time."""
    record, other = public.manifest.tensors[name], reader.manifest.tensors[name]
    if record.dtype != other.dtype or record.shape[1:] != other.shape[1:]:
        return False
    if record.shape[:1] > other.shape[:1]:
        return False
    for chunk in record.chunks:
        here = public.chunk(name, chunk)
        there = torch.empty_like(here)
        reader.fill(name, chunk.region, there)
        if not torch.equal(here.flatten().view(torch.uint8), there.flatten().view(torch.uint8)):
            return False
    return True
