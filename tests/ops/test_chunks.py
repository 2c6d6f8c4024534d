import itertools

import pytest
import torch
from torch import Tensor

from moesys.ops import library, reference
from moesys.ops.chunks import add_chunks, pack_chunks

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_pair_of_types = pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(TYPES, TYPES)), ids=str
)
LENGTHS = (8, 0, 3, 4096, 1, 5000, 64, 0, 17, 8192, 4097)
"""Odd ones make all that follow them start at an odd place."""
ONE_LAUNCH = 128
"""Chunks of it."""


def chunks(lengths, dtype: torch.dtype, device: str = "cpu", skip: int = 0, seed: int = 0):
    """Views of one tensor, the first at its number `skip`, of all sizes that the types have and more."""
    numbers = torch.Generator().manual_seed(seed)
    total = skip + sum(lengths)
    sizes = 10.0 ** (12 * torch.rand(total, generator=numbers, dtype=torch.float64) - 8)
    flat = torch.randn(total, generator=numbers, dtype=torch.float64) * sizes
    return list(flat.to(device, dtype)[skip:].split(list(lengths)))


def bits(tensor: Tensor) -> Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()]).cpu()


def check_pack(given: list[Tensor], like: Tensor) -> None:
    flat = pack_chunks(given, like)
    assert (flat.dtype, flat.device, flat.dim()) == (like.dtype, like.device, 1)
    assert torch.equal(bits(flat), bits(reference.pack_chunks(given, like)))


def check_add(parts: list[Tensor], totals: list[Tensor], order: list[int]) -> None:
    """Parts in turn to totals[i], i of `order`; nothing beside the totals changes."""
    results = []
    for add in (add_chunks, reference.add_chunks):
        flat = torch.cat([torch.cat([t.new_ones(1), t.flatten()]) for t in totals])
        own = [room[1:] for room in flat.split([1 + total.numel() for total in totals])]
        add([(part, own[i]) for part, i in zip(parts, order, strict=True)])
        results.append(bits(flat))
    assert torch.equal(*results)


@each_device
@each_pair_of_types
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_packed_bits_are_the_references(
    source: torch.dtype, target: torch.dtype, skip: int, device: str
) -> None:
    check_pack(chunks(LENGTHS, source, device, skip), torch.empty(0, dtype=target, device=device))


@each_device
@each_pair_of_types
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_sums_are_the_references(
    source: torch.dtype, target: torch.dtype, skip: int, device: str
) -> None:
    """Each total gets parts of three rounds, the longest one more."""
    totals = chunks(LENGTHS, target, device, seed=1)
    order = [*range(len(LENGTHS)), *reversed(range(len(LENGTHS))), 9, *range(len(LENGTHS))]
    parts = chunks([LENGTHS[i] for i in order], source, device, skip, seed=2)
    check_add(parts, totals, order)


@each_device
@pytest.mark.parametrize("target", TYPES, ids=str)
def test_chunks_of_several_types(target: torch.dtype, device: str) -> None:
    """What is passed on has been rounded before, what is sent for the first time has not."""
    mixed = [
        chunk
        for i, dtype in enumerate(TYPES)
        for chunk in chunks((7, 16, 4100), dtype, device, seed=i)
    ]
    check_pack(mixed, torch.empty(0, dtype=target, device=device))


@each_device
@pytest.mark.parametrize("number", [1, ONE_LAUNCH, ONE_LAUNCH + 1, 3 * ONE_LAUNCH - 1])
def test_any_number_of_chunks(number: int, device: str) -> None:
    lengths = [i % 5 * 7 for i in range(number)]
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    parts = chunks(lengths, torch.float32, device)
    check_pack(parts, like)
    check_add(parts, chunks(lengths, torch.float32, device, seed=1), list(range(number)))


@each_device
def test_more_parts_of_a_total_than_fit_into_a_launch(device: str) -> None:
    order = [0] * 100 + [1, 0] * 150 + [2] + [1] * 77
    parts = chunks([33] * len(order), torch.float32, device)
    check_add(parts, chunks([33] * 3, torch.bfloat16, device, seed=1), order)


@each_device
def test_none_and_empty_ones(device: str) -> None:
    like = torch.ones(3, device=device, dtype=torch.bfloat16)
    empty = torch.empty(0, 4, device=device)
    for none in ([], [empty], [empty, empty]):
        flat = pack_chunks(none, like)
        assert flat.shape == (0,)
        assert flat.dtype == like.dtype
    total = torch.ones(3, device=device)
    add_chunks([])
    add_chunks([(empty, empty), (total.clone(), total), (empty, empty)])
    assert total.tolist() == [2, 2, 2]


@each_device
def test_one_huge_chunk_among_small_ones(device: str) -> None:
    lengths = (5, 3_000_001, 2)
    parts = chunks(lengths, torch.float32, device)
    check_pack(parts, torch.empty(0, dtype=torch.bfloat16, device=device))
    check_add(parts, chunks(lengths, torch.float32, device, seed=1), [0, 1, 2])


@each_device
@each_pair_of_types
def test_ties_ends_of_the_range_and_what_is_no_number(
    source: torch.dtype, target: torch.dtype, device: str
) -> None:
    """As torch rounds them; which of the many NaNs comes out is nobody's business."""
    ends = [
        value
        for info in map(torch.finfo, TYPES)
        for value in (info.max, info.tiny, info.tiny / 2, info.eps, 1 + info.eps / 2, 1 + info.eps)
    ]
    ties = [1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40, 65520.0, 2.0**-25]
    values = [*ends, *ties, 0.0, float("inf"), float("nan")]
    chunk = torch.tensor(values + [-v for v in values], dtype=torch.float64).to(device, source)
    like = torch.empty(0, dtype=target, device=device)
    got, want = pack_chunks([chunk], like), reference.pack_chunks([chunk], like)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got.nan_to_num(7)), bits(want.nan_to_num(7)))
    total = torch.ones_like(chunk, dtype=target)
    want = total + chunk
    add_chunks([(chunk, total)])
    torch.testing.assert_close(total, want.to(target), rtol=0, atol=0, equal_nan=True)


@each_device
def test_sums_are_in_order_and_rounded_each_time(device: str) -> None:
    total = torch.tensor([256.0], device=device, dtype=torch.bfloat16)
    parts = [torch.tensor([value], device=device) for value in (1.0, 1.0, -256.0, 1.0)]
    add_chunks([(part, total) for part in parts])
    assert total.item() == 1
    total.fill_(256)
    add_chunks([(part, total) for part in reversed(parts)])
    assert total.item() == 2


@each_device
def test_chunks_of_other_shapes_and_not_contiguous(device: str) -> None:
    like = torch.empty(0, device=device)
    matrix = torch.arange(12.0, device=device).view(3, 4)
    flat = pack_chunks([matrix.t(), matrix[:, 1]], like)
    assert flat.tolist() == [*matrix.t().flatten().tolist(), 1, 5, 9]
    total = torch.zeros(4, 3, device=device)
    add_chunks([(matrix, total), (matrix.view(-1), total)])
    assert torch.equal(total.view(-1), 2 * matrix.view(-1))
    strided = torch.zeros(3, 4, device=device).t()
    add_chunks([(matrix.view(-1), strided), (matrix.view(4, 3), strided)])
    assert torch.equal(strided, 2 * matrix.view(4, 3))


@each_device
def test_what_autograd_saved_of_a_total_is_known_to_be_gone(device: str) -> None:
    weight = torch.ones(3, device=device, requires_grad=True)
    total = torch.ones(3, device=device)
    product = weight * total
    add_chunks([(torch.ones(3, device=device), total)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert not pack_chunks([weight], weight).requires_grad


def test_without_the_library(monkeypatch) -> None:
    parts = chunks(LENGTHS, torch.float32)
    like = torch.empty(0, dtype=torch.bfloat16)
    flat, total = pack_chunks(parts, like), torch.zeros(5000)
    add_chunks([(parts[5], total)])
    monkeypatch.setattr(library, "_DEVICES", frozenset())
    assert torch.equal(pack_chunks(parts, like), flat)
    add_chunks([(parts[5], total)])
    assert torch.equal(total, 2 * parts[5])


def test_wrong_arguments() -> None:
    like = torch.zeros(4)
    with pytest.raises(RuntimeError, match="pack_chunks: needs fp32, fp64, bf16 or fp16"):
        pack_chunks([like, like.long()], like)
    with pytest.raises(RuntimeError, match="pack_chunks: needs fp32, fp64, bf16 or fp16"):
        pack_chunks([], like.int())
    with pytest.raises(RuntimeError, match="part 1 has 3 numbers, its total 4"):
        add_chunks([(torch.zeros(4), like), (torch.zeros(3), torch.zeros(4))])
    with pytest.raises(RuntimeError, match="add_chunks: needs fp32, fp64, bf16 or fp16"):
        add_chunks([(like.long(), torch.zeros(4))])
    with pytest.raises(RuntimeError, match="pair 1 is of other types than the first"):
        add_chunks([(like, torch.zeros(4)), (like.bfloat16(), torch.zeros(4))])
    with pytest.raises(RuntimeError, match="pair 1 is of other types than the first"):
        add_chunks([(like, torch.zeros(4)), (like, torch.zeros(4).double())])
    with pytest.raises(RuntimeError, match="total 1 shares memory with another"):
        add_chunks([(torch.zeros(4), like), (torch.zeros(2), like[:2])])


@pytest.mark.gpu
def test_another_device() -> None:
    like = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="chunk 1 is on another device"):
        pack_chunks([like, like.cpu()], like)
    with pytest.raises(RuntimeError, match="part 0 is on another device"):
        add_chunks([(like.cpu(), like)])


@each_device
def test_opcheck(device: str) -> None:
    parts = chunks((3, 8), torch.float32, device)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(torch.ops.moesys.pack_chunks, (parts, like))
    totals = [torch.zeros_like(part) for part in parts]
    torch.library.opcheck(torch.ops.moesys.add_chunks, (parts, totals))
