"""The memory layer against what the papers say of one token, in fp64: values and all gradients.

Shapes: T tokens, D model, K values of a token, N keys of an axis, R rank, H heads, V value.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.config.schema import MemoryLayersConfig, ModelConfig
from moesys.models import init
from moesys.models.memory_layer import MemoryLayer, leading_pair
from moesys.models.rope import rope_tables
from moesys.models.transformer import MemoryBlock, Transformer
from moesys.parallelize.build import build_model
from moesys.testing.small_run import small_model

MEMORY = MemoryLayersConfig(
    layers=(2,), num_keys=12, top_k=3, d_key=10, d_value=12, d_pre=6, rank=2, heads=2
)
MODEL = small_model(num_layers=4, memory_layers=MEMORY)
VARIANTS = {
    "cores of two heads": MEMORY,
    "one core": replace(MEMORY, heads=1),
    "rank three, four heads": replace(MEMORY, rank=3, heads=4),
    "rank one": replace(MEMORY, rank=1),
    "no pre-values": replace(MEMORY, d_pre=0),
    "all keys": replace(MEMORY, num_keys=4, top_k=4),
}


def made(memory: MemoryLayersConfig, seed: int = 0) -> MemoryLayer:
    config = replace(MODEL, memory_layers=memory)
    model = build_model(config, None, torch.device("cpu"), seed)
    block = model.blocks()[2]
    assert isinstance(block, MemoryBlock)
    return block.memory


def of_token(x_D: Tensor, p: dict[str, Tensor], memory: MemoryLayersConfig, eps: float) -> Tensor:
    """One token's output, pair by pair."""

    def norm(x: Tensor, e: float) -> Tensor:
        return x / (x.square().mean() + e).sqrt()

    queries = (p["query"] @ x_D).chunk(2)
    scores = []  # of rows, of columns: [N][R]
    for axis, query in enumerate(queries):
        query = norm(query, eps) * p["query_norm.weight"]
        of_axis = [
            torch.stack([norm(p["keys"][axis, r, n], 2**-23) @ query for r in range(memory.rank)])
            for n in range(memory.num_keys)
        ]
        scores.append([s / memory.d_key**0.5 for s in of_axis])
    core = p["core"].sum(0)
    left, _, right = torch.linalg.svd(core.detach())
    sign = right[0].sum().sign()

    def best(of_axis: list[Tensor], vector: Tensor) -> list[int]:
        near = sorted(range(memory.num_keys), key=lambda n: -(of_axis[n].detach() @ vector).item())
        return near[: memory.top_k]

    rows, columns = best(scores[0], sign * left[:, 0]), best(scores[1], sign * right[0])
    pairs = [(i, j) for i in rows for j in columns]
    exact = {(i, j): (scores[0][i] @ core @ scores[1][j]).item() for i, j in pairs}
    chosen = sorted(pairs, key=lambda pair: -exact[pair])[: memory.top_k]
    value = torch.zeros(memory.d_value, dtype=x_D.dtype)
    for i, j in chosen:
        at = i * memory.num_keys + j
        gate = 1.0
        if memory.d_pre:
            gate = F.gelu(p["table.pre_values"][at] @ (p["pre"] @ x_D))
        slices = [
            (scores[0][i] @ p["core"][h] @ scores[1][j]) * gate * p["table.values"][h, at]
            for h in range(memory.heads)
        ]
        value = value + torch.cat(slices)
    return p["down"] @ value


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_the_references(name: str) -> None:
    memory = VARIANTS[name]
    layer = made(memory)
    x_TD = torch.randn(9, MODEL.d_model, generator=torch.Generator().manual_seed(1))
    weights_TD = torch.randn(9, MODEL.d_model, generator=torch.Generator().manual_seed(2))
    x_TD.requires_grad_()
    y_TD = layer(x_TD)
    (y_TD * weights_TD).sum().backward()
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    their_x_TD = x_TD.detach().double().requires_grad_()
    their_y_TD = torch.stack([of_token(x_D, exact, memory, MODEL.norm_eps) for x_D in their_x_TD])
    (their_y_TD * weights_TD).sum().backward()
    assert their_y_TD.abs().max() > 1e-3
    torch.testing.assert_close(y_TD.double(), their_y_TD, rtol=1e-4, atol=1e-6)
    grads = {name: (p.grad, exact[name].grad) for name, p in layer.named_parameters()}
    for what, (ours, theirs) in (grads | {"x": (x_TD.grad, their_x_TD.grad)}).items():
        assert ours is not None, what
        assert theirs is not None, what
        assert theirs.abs().max() > 0, what
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5, msg=what)


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 5),
    num_keys=st.integers(1, 9),
    rank=st.integers(1, 4),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_with_all_keys_as_candidates_the_best_pairs_of_all_are_read(
    tokens, num_keys, rank, heads, seed, data
) -> None:
    """What product keys leave out is only what their candidates leave out; and no value is read twice."""
    top_k = data.draw(st.integers(1, num_keys))
    memory = MemoryLayersConfig(
        layers=(2,), num_keys=num_keys, top_k=num_keys, d_value=2 * heads, rank=rank, heads=heads
    )
    layer = made(memory, seed)
    x_TD = torch.randn(tokens, MODEL.d_model, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        row_TRN, column_TRN = layer.key_scores(x_TD)
        ids_TK = layer.choose(row_TRN, column_TRN).long()
        all_TNN = torch.einsum("trn,rs,tsm->tnm", row_TRN, layer.core.sum(0), column_TRN)
        scores_TK = layer.value_scores(row_TRN, column_TRN, ids_TK).sum(-1)
        best_TK = all_TNN.flatten(1).topk(num_keys)[0]
        layer.top_k = top_k
        fewer_TK = layer.choose(row_TRN, column_TRN)
    torch.testing.assert_close(scores_TK, best_TK, rtol=1e-4, atol=1e-5)
    for ids_K in (*ids_TK.tolist(), *fewer_TK.tolist()):
        assert len(set(ids_K)) == len(ids_K)
        assert all(0 <= i < num_keys**2 for i in ids_K)


def random_core(size: int, least: float) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.empty(size, size).uniform_(least, 1.0, generator=generator)


@pytest.mark.parametrize(
    "core_RR",
    [
        *(random_core(size, 0.0) for size in (1, 2, 5)),  # as it is drawn
        *(random_core(size, -1.0) for size in (2, 3, 4)),
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
        torch.tensor([[0.0, 2.0], [-1.0, 0.0]]),
    ],
)
def test_the_leading_pair_is_that_of_the_singular_values(core_RR: Tensor) -> None:
    left_R, right_R = leading_pair(core_RR)
    left, values, right = torch.linalg.svd(core_RR)
    torch.testing.assert_close(left_R @ core_RR @ right_R, values[0])
    sign = torch.where(right[0].sum() < 0, -1.0, 1.0) if right[0].sum().abs() > 1e-3 else 0.0
    if sign:
        torch.testing.assert_close(left_R, sign * left[:, 0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(right_R, sign * right[0], rtol=1e-3, atol=1e-3)


def test_a_core_of_zeros_chooses_something() -> None:
    layer = made(MEMORY)
    with torch.no_grad():
        layer.core.zero_()
    y_TD = layer(torch.randn(4, MODEL.d_model))
    assert y_TD.isfinite().all()


def test_autocast_changes_the_projections_alone() -> None:
    """What is chosen is what fp32 chooses."""
    layer, x_TD = made(MEMORY), torch.randn(6, MODEL.d_model)
    chosen: list[Tensor] = []
    layer.table.register_forward_pre_hook(lambda _, args: chosen.append(args[0]))
    exact = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x_TD)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(*chosen)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.02)


def test_a_block_adds_its_memory_to_its_feed_forward() -> None:
    config = replace(MODEL, memory_layers=replace(MEMORY, layers=(1, 3)))
    model = build_model(config, None, torch.device("cpu"), seed=0)
    assert [type(block).__name__ for block in model.blocks()] == [
        *("DenseBlock", "MemoryBlock", "MoEBlock", "MemoryBlock")
    ]
    assert config.moe_layers == (2,)
    assert [*model.moe_places()] == [0]
    ids_BS = torch.randint(0, 64, (2, 8))
    before = model(ids_BS)[0]
    with torch.no_grad():
        for block in model.blocks():
            if isinstance(block, MemoryBlock):
                block.memory.down.zero_()
    dense = replace(MODEL, memory_layers=MemoryLayersConfig(), num_dense_layers=4)
    plain = Transformer(dense)
    ours = {n: p for n, p in model.named_parameters() if ".memory." not in n and ".moe." not in n}
    missing = plain.load_state_dict(ours, strict=False).missing_keys
    assert all(name.startswith("layers.2.ffn.") for name in missing)
    assert not torch.equal(model(ids_BS)[0], before)
    for ours_block, block in zip(model.blocks()[:2], plain.blocks()[:2], strict=True):
        x_TD = torch.randn(16, config.d_model)
        rope_SH = rope_tables(torch.arange(8), config.resolved_head_dim, 1e4)
        torch.testing.assert_close(ours_block(x_TD, rope_SH), block(x_TD, rope_SH))


def drawn(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    return dict(made(config.memory_layers, seed).table.named_parameters())


def test_tables_are_drawn_in_runs_as_wide_as_what_they_stand_for(monkeypatch) -> None:
    large = replace(MODEL, memory_layers=replace(MEMORY, num_keys=40, d_value=64, d_pre=16))
    table = drawn(large, 3)
    for name, std in (("values", 32**-0.5), ("pre_values", 16**-0.5)):
        assert table[name].std().item() == pytest.approx(std, rel=0.02)
    monkeypatch.setattr(init, "_RUN_ROWS", 700)
    runs = drawn(large, 3)["values"]
    assert torch.equal(runs, drawn(large, 3)["values"])
    assert len(runs.flatten().unique()) > 0.99 * runs.numel()  # no run is another's copy


@pytest.mark.parametrize("cut", [(1, 3), (0, 2), (2, 2)], ids=str)
def test_a_rank_draws_its_part_of_the_whole(cut, monkeypatch) -> None:
    monkeypatch.setattr(init, "_RUN_ROWS", 5)
    law = init._law("layers.0.memory.table.values", 6, MODEL)
    shape = torch.Size((2, 13, 6))
    whole, everything = torch.empty(shape), (slice(0, 2), slice(0, 13), slice(0, 6))
    init._draw_rows("key", shape, whole, everything, law)
    inside = (slice(cut[0] // 2, 2), slice(cut[0], 9 + cut[1]), slice(cut[1], 6))
    part = torch.empty([s.stop - s.start for s in inside])
    init._draw_rows("key", shape, part, inside, law)
    assert torch.equal(part, whole[inside])
