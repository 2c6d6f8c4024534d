import pytest
import torch
from torch import Tensor

from moesys.ops import halves, library
from moesys.ops.halves import MOST_CUTS, halve, halve_all_at_once

E, K, X = 5, 2, 19


def case(kind: str, num_tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Sketches and experts; some slots have none."""
    generator = torch.Generator().manual_seed(3)
    sketch_TX = torch.randn(num_tokens, X, generator=generator)
    if kind == "clustered":
        sketch_TX = sketch_TX[torch.randint(0, 9, (num_tokens,), generator=generator)] + (
            0.1 * torch.randn(num_tokens, X, generator=generator)
        )
    if kind == "all equal":
        sketch_TX = sketch_TX[:1].expand(num_tokens, X).contiguous()
    if kind == "further and further":  # each cut takes few off
        sketch_TX[:, 0] = 1.5 ** torch.arange(num_tokens).clamp(max=90)
    return sketch_TX, torch.randint(-1, E, (num_tokens, K), generator=generator)


def spread(members: Tensor) -> float:
    return float((members - members.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("kind", ["random", "clustered", "all equal", "further and further"])
@pytest.mark.parametrize("most", [1e-6, 0.3, 5.0, 15.0, 1e9])
def test_parts_keep_to_the_bound(kind: str, most: float) -> None:
    """One part of an expert's slots after the other, or all at once: the same ones."""
    sketch_TX, ids_TK = case(kind)
    codes_TK = halve(sketch_TX, ids_TK, E, torch.tensor(most))
    if kind != "further and further":
        expected_TK = halve_all_at_once(sketch_TX, ids_TK, E, torch.tensor(most))
        assert torch.equal(codes_TK, expected_TK)
    codes_N, ids_N = codes_TK.flatten(), ids_TK.flatten()
    num_parts = 0
    for code in codes_N.unique().tolist():
        slots = (codes_N == code).nonzero()[:, 0]
        assert code == slots[0]
        if ids_N[code] < 0:
            assert len(slots) == 1
            continue
        num_parts += 1
        assert len(ids_N[slots].unique()) == 1
        assert len(slots) == 1 or spread(sketch_TX[slots // K]) <= most * 1.001 + 1e-9
    if most == 1e9 and kind != "further and further":
        assert num_parts == E
    if most == 15.0 and kind == "random":
        assert E < num_parts < 200
    if kind == "clustered" and most == 0.3:
        assert num_parts <= 12 * E, "nine heaps"


def test_what_is_still_wide_after_the_last_cut_is_single_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(halves, "MOST_CUTS", 2)
    sketch_TX, ids_TK = case("random")
    narrow = spread(sketch_TX) / 1.1
    for op in (halve, halve_all_at_once):
        codes_N = op(sketch_TX, ids_TK, E, torch.tensor(narrow)).flatten()
        sizes = codes_N.unique(return_counts=True)[1].tolist()
        assert 1 in sizes
        assert max(sizes) > 1, "some parts are narrow before"
        assert set(op(sketch_TX, ids_TK, E, torch.tensor(1e-6)).flatten().tolist()) == {*range(400)}


def test_a_cut_is_where_slots_differ_most() -> None:
    """Two heaps: cut between them, wherever the others of their dimensions go."""
    generator = torch.Generator().manual_seed(0)
    sketch_TX = 0.3 * torch.randn(60, X, generator=generator)
    is_far_T = torch.rand(60, generator=generator) < 0.4
    sketch_TX[is_far_T] += torch.randn(X, generator=generator)
    within = max(spread(sketch_TX[is_far_T]), spread(sketch_TX[~is_far_T]))
    codes_T1 = halve(sketch_TX, torch.zeros(60, 1).long(), 1, torch.tensor(1.01 * within))
    assert len(codes_T1.unique()) == 2
    assert len(codes_T1[is_far_T].unique()) == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_first_token_that_is_not_finite_is_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketch_TX, ids_TK = case("random", 9)
    sketch_TX[5, 3] = sketch_TX[7, 0] = float(value)
    with pytest.raises(RuntimeError, match="halve: row 5 is not finite"):
        halve(sketch_TX, ids_TK, E, torch.tensor(1.0))
    monkeypatch.setattr(library, "_DEVICES", frozenset())
    with pytest.raises(RuntimeError, match="halve: row 5 is not finite"):
        halve(sketch_TX, ids_TK, E, torch.tensor(1.0))


def test_wrong_arguments() -> None:
    sketch_TX, ids_TK = case("random", 6)
    most = torch.tensor(1.0)
    with pytest.raises(ValueError, match="sketches must be fp32"):
        halve(sketch_TX.double(), ids_TK, E, most)
    with pytest.raises(ValueError, match="are not of 5 tokens"):
        halve(sketch_TX[:5], ids_TK, E, most)
    with pytest.raises(RuntimeError, match="neither -1 nor a valid index"):
        halve(sketch_TX, ids_TK + E, E, most)
    assert halve(sketch_TX[:0], ids_TK[:0], E, most).shape == (0, K)
    none_TK = torch.full_like(ids_TK, -1)
    assert halve(sketch_TX, none_TK, E, most).flatten().tolist() == list(range(12))


def test_op_as_torch_wants_it() -> None:
    assert library.is_loaded()
    sketch_TX, ids_TK = case("random", 20)
    torch.library.opcheck(torch.ops.moesys.halve, (sketch_TX, ids_TK, E, MOST_CUTS, 2, 5.0))
