import itertools

import pytest
import torch
from torch import Tensor

from moesys.ops import library
from moesys.ops.clusters import SlotsByCode, slots_by_code
from moesys.ops.splits import split_by_digit, split_rows

E, K, BASE, DIGITS = 5, 2, 4, 4


def case(kind: str, num_tokens: int = 200) -> tuple[Tensor, SlotsByCode]:
    """Sketches, and slots in order of codes that say a little of them; some slots have no expert."""
    generator = torch.Generator().manual_seed(3)
    sketch_TX = torch.randn(num_tokens, 19, generator=generator)
    if kind == "clustered":
        sketch_TX = sketch_TX[torch.randint(0, 9, (num_tokens,), generator=generator)] + (
            0.1 * torch.randn(num_tokens, 19, generator=generator)
        )
    if kind == "all equal":
        sketch_TX = sketch_TX[:1].expand(num_tokens, 19).contiguous()
    codes_T = sum(
        BASE ** (DIGITS - 1 - h) * (sketch_TX[:, h] * 2).round().long().clamp(0, BASE - 1)
        for h in range(DIGITS)
    )
    assert isinstance(codes_T, Tensor)
    ids_TK = torch.randint(-1, E, (num_tokens, K), generator=generator)
    return sketch_TX, slots_by_code(ids_TK, codes_T[:, None].expand(num_tokens, K), E)


@pytest.mark.parametrize("kind", ["random", "clustered", "all equal"])
@pytest.mark.parametrize("most", [0.0, 0.3, 5.0, 15.0, 1e9])
def test_one_pass_cuts_as_digit_by_digit(kind: str, most: float) -> None:
    sketch_TX, by_code = case(kind)
    found_N = split_rows(sketch_TX, by_code, BASE, DIGITS, torch.tensor(most))
    expected_N = split_by_digit(sketch_TX, by_code, BASE, DIGITS, torch.tensor(most))
    if kind == "all equal" and most == 0:
        return  # what rounding makes of a mean decides
    assert torch.equal(found_N, expected_N)
    has_row_N = by_code.ids_N < E
    assert not found_N[~has_row_N].any()
    if most == 1e9:
        assert torch.equal(found_N, has_row_N & by_code.is_new(by_code.codes_N // BASE**3))


def test_rows_are_as_wide_as_they_may_be() -> None:
    """The spread of each row of several, by its definition; and of the wider one that it was cut from."""
    sketch_TX, by_code = case("random")
    most = 10.0
    is_first_N = split_rows(sketch_TX, by_code, BASE, DIGITS, torch.tensor(most))
    num_members = int((by_code.ids_N < E).sum())
    begins = [*is_first_N.nonzero()[:, 0].tolist(), num_members]
    sizes = set()

    def spread(places: Tensor) -> float:
        members = sketch_TX[by_code.slots_N[places] // K]
        return float((members - members.mean(0)).square().sum(1).mean())

    for begin, end in itertools.pairwise(begins):
        sizes.add(end - begin)
        assert spread(torch.arange(begin, end)) <= most
        codes, expert = by_code.codes_N, by_code.ids_N[begin]
        for left in reversed(range(DIGITS)):
            prefix_N = codes // BASE**left
            wider = ((by_code.ids_N == expert) & (prefix_N == prefix_N[begin])).nonzero()[:, 0]
            if len(wider) > end - begin:
                assert spread(wider) > most
    assert 1 in sizes
    assert len(sizes) > 3


def test_no_slot() -> None:
    by_code = slots_by_code(torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K).long(), E)
    found = split_rows(torch.zeros(0, 7), by_code, BASE, DIGITS, torch.tensor(1.0))
    assert found.shape == (0,)


def test_wrong_arguments() -> None:
    sketch_TX, by_code = case("random", 6)
    with pytest.raises(ValueError, match="sketches must be fp32"):
        split_rows(sketch_TX.double(), by_code, BASE, DIGITS, torch.tensor(1.0))
    with pytest.raises(ValueError, match="5 sketches are not those of 12 slots"):
        split_rows(sketch_TX[:5], by_code, BASE, DIGITS, torch.tensor(1.0))
    wrong = by_code._replace(codes_N=by_code.codes_N - 1000)
    with pytest.raises(RuntimeError, match="codes at least 0"):
        split_rows(sketch_TX, wrong, BASE, DIGITS, torch.tensor(1.0))


def test_op_as_torch_wants_it() -> None:
    assert library.is_loaded()
    sketch_TX, by_code = case("random", 20)
    slots = (by_code.slots_N, by_code.ids_N, by_code.codes_N)
    torch.library.opcheck(torch.ops.moesys.split_rows, (sketch_TX, *slots, K, E, BASE, DIGITS, 5.0))
