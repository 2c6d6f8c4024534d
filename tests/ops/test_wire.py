import pytest
import torch
from torch import Tensor

from moesys.ops import library, reference
from moesys.ops.wire import CARRIED_ROWS, LowPrecision, WireFormat, pack, unpack

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
KINDS: tuple[LowPrecision, ...] = ("int8", "e4m3", "e5m2", "int4")
each_kind = pytest.mark.parametrize("kind", KINDS)
LARGEST = {"int8": 127, "int4": 7}
FP8: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def finfo(kind: LowPrecision) -> torch.finfo:
    return torch.finfo(FP8[kind])


def rows(num_rows: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of many sizes, one of zeros, one with a single large number."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_rows, d, generator=generator)
    x_ND *= torch.logspace(-6, 4, num_rows)[:, None] if dtype != torch.float16 else 1
    if num_rows > 2:
        x_ND[0] = 0
        x_ND[1] = 1e-3
        x_ND[1, -1] = -50
    return x_ND.to(dtype)


def by_reference(x_ND: Tensor, format: WireFormat, slots_N: Tensor, top_k: int) -> Tensor:
    carried = CARRIED_ROWS if format.hands_on else 0
    rounding = (format.is_stochastic, carried, format.is_checked)
    how = (top_k, KINDS.index(format.kind), format.block, *rounding)
    return reference.pack(x_ND, slots_N, *how)


@each_device
@each_kind
@pytest.mark.parametrize("block", [0, 16, 7, 6])
@pytest.mark.parametrize("how", ["nearest", "stochastic", "hands on", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bytes_are_the_references(
    kind: LowPrecision, block: int, how: str, dtype: torch.dtype, device: str
) -> None:
    if block == 7 and kind == "int4":
        pytest.skip("two numbers share a byte")
    format = WireFormat(
        kind=kind,
        block=block,
        is_stochastic=how in ("stochastic", "both"),
        hands_on=how in ("hands on", "both"),
    )
    x_TD = rows(150, 45, dtype).to(device)
    slots_N = torch.randint(-1, 300, (333,), generator=torch.Generator().manual_seed(1)).to(device)
    bytes_NW = pack(x_TD, format, slots_N, 2)
    assert bytes_NW.shape == (333, format.row_bytes(45))
    assert torch.equal(bytes_NW, by_reference(x_TD, format, slots_N, 2))
    for out in (dtype, torch.float32):
        rows_ND = unpack(bytes_NW, format, 45, out)
        like = torch.empty(0, dtype=out, device=device)
        number = KINDS.index(kind)
        assert torch.equal(rows_ND, reference.unpack(bytes_NW, like, 45, number, block))
        assert (rows_ND[slots_N < 0] == 0).all()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_codes_are_torchs(kind: LowPrecision) -> None:
    """Every fp8 number that is finite, each between two of them, and ties, as torch rounds them."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(FP8[kind]).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers[1:] * 0.7 + numbers[:-1] * 0.3])
    row = torch.cat([numbers, between])[None]
    format = WireFormat(kind=kind)
    bytes_NW = pack(row, format)
    assert bytes_NW[0, -4:].clone().view(torch.float32).item() == 1
    expected = row.to(FP8[kind]).view(torch.uint8)
    # Both zeros are zero.
    assert torch.equal(bytes_NW[:, :-4].view(FP8[kind]).float(), expected.view(FP8[kind]).float())


@each_kind
@pytest.mark.parametrize("block", [0, 32])
def test_how_near(kind: LowPrecision, block: int) -> None:
    x_ND = rows(60, 100)
    format = WireFormat(kind=kind, block=block)
    back_ND = unpack(pack(x_ND, format), format, 100, torch.float32)
    largest_ND = torch.cat(
        [
            part.abs().amax(1, keepdim=True).expand_as(part)
            for part in x_ND.split(block or 100, dim=1)
        ],
        dim=1,
    )
    if kind in LARGEST:
        bound_ND = largest_ND / LARGEST[kind] / 2
    else:
        info = finfo(kind)
        smallest = info.smallest_normal * info.eps / info.max
        bound_ND = (x_ND.abs() * info.eps).maximum(largest_ND * smallest) / 2
    assert ((back_ND - x_ND).abs() <= bound_ND * 1.0001).all()
    assert torch.equal(back_ND[0], torch.zeros(100))


@pytest.mark.parametrize(("block", "expected"), [(0, 0.135), (64, 0.108)])
def test_four_bits_want_few_columns_to_a_scale(block: int, expected: float) -> None:
    """Of normal numbers: the error is the largest one's over 7, and over sqrt(12)."""
    x_ND = torch.randn(1000, 512, generator=torch.Generator().manual_seed(0))
    format = WireFormat(kind="int4", block=block)
    back_ND = unpack(pack(x_ND, format), format, 512, torch.float32)
    assert float((back_ND - x_ND).norm() / x_ND.norm()) == pytest.approx(expected, rel=0.01)


def step(x_ND: Tensor, kind: LowPrecision) -> Tensor:
    """Between the two codes that a number lies between."""
    scale_N1 = x_ND.abs().amax(1, keepdim=True) / (LARGEST.get(kind) or finfo(kind).max)
    if kind in LARGEST:
        return scale_N1.expand_as(x_ND)
    info = finfo(kind)
    exponent_ND = (x_ND / scale_N1).abs().clamp(min=info.smallest_normal).log2().floor()
    return info.eps * 2**exponent_ND * scale_N1


@each_kind
def test_stochastic_rounding_has_the_numbers_as_its_mean(kind: LowPrecision) -> None:
    x_ND = (torch.rand(1, 64, generator=torch.Generator().manual_seed(4)) - 0.5).expand(4000, 64)
    format = WireFormat(kind=kind, is_stochastic=True)
    back_ND = unpack(pack(x_ND, format), format, 64, torch.float32)
    step_D = step(x_ND[:1], kind)[0]
    error_D = (back_ND.mean(0) - x_ND[0]).abs() / step_D
    # The mean of 4000 throws is within 5 of its standard deviations, at most 1 / (2 sqrt(4000)).
    assert error_D.max() < 5 / (2 * 4000**0.5)
    nearest_ND = unpack(pack(x_ND, WireFormat(kind=kind)), WireFormat(kind=kind), 64, torch.float32)
    assert ((nearest_ND.mean(0) - x_ND[0]).abs() / step_D).max() > 0.3
    assert torch.equal(pack(x_ND, format), pack(x_ND, format))


@each_kind
def test_what_is_handed_on_keeps_the_sum(kind: LowPrecision) -> None:
    """Of 64 rows, within the rounding of the last; without it errors of one sign add up."""
    x_ND = torch.full((CARRIED_ROWS, 33), 0.3)
    x_ND[:, 0] = 1  # the scale
    x_ND[:, 1:] += torch.linspace(0, 0.01, 32)
    plain, handing = WireFormat(kind=kind), WireFormat(kind=kind, hands_on=True)
    sums = [unpack(pack(x_ND, f), f, 33, torch.float32).sum(0) for f in (plain, handing)]
    worst, kept = ((found - x_ND.sum(0)).abs().max().item() for found in sums)
    assert kept <= step(x_ND[:1], kind).max().item()
    assert worst > 5 * kept


@each_kind
def test_a_small_row_is_given_no_more_than_its_own_step(kind: LowPrecision) -> None:
    """What a large one leaves waits for it: each number is off by two of its own steps at most."""
    x_ND = torch.randn(CARRIED_ROWS, 33, generator=torch.Generator().manual_seed(7))
    x_ND[::5] *= 1000
    format = WireFormat(kind=kind, hands_on=True)
    off_ND = unpack(pack(x_ND, format), format, 33, torch.float32) - x_ND
    assert (off_ND.abs() <= 2 * step(x_ND, kind) * 1.001).all()
    plain = WireFormat(kind=kind)
    plain_ND = unpack(pack(x_ND, plain), plain, 33, torch.float32) - x_ND
    assert off_ND.sum(0).norm() < plain_ND.sum(0).norm() / 1.5


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("hands_on", [False, True])
@each_kind
def test_the_first_row_that_is_not_finite_is_named(
    kind: LowPrecision, value: str, hands_on: bool
) -> None:
    x_ND = torch.zeros(2000, 40)
    x_ND[5, 33] = x_ND[6, 1] = x_ND[1999, 2] = float(value)
    format = WireFormat(kind=kind, block=16, hands_on=hands_on)
    with pytest.raises(RuntimeError, match="pack: row 5 is not finite"):
        pack(x_ND, format)
    with pytest.raises(RuntimeError, match="pack: row 5 is not finite"):
        by_reference(x_ND, format, torch.arange(2000), 1)


@each_device
@pytest.mark.parametrize("hands_on", [False, True])
@each_kind
def test_a_block_that_is_not_finite_is_nan_where_none_is_refused(
    kind: LowPrecision, hands_on: bool, device: str
) -> None:
    """And all else as if it were zeros."""
    x_ND = rows(80, 40).to(device)
    x_ND[7, 33], x_ND[9, 2] = float("nan"), float("inf")
    format = WireFormat(kind=kind, block=16, hands_on=hands_on, is_checked=False)
    bytes_NW = pack(x_ND, format)
    assert torch.equal(bytes_NW, by_reference(x_ND, format, torch.arange(80).to(device), 1))
    back_ND = unpack(bytes_NW, format, 40, torch.float32)
    is_nan_ND = torch.zeros(80, 40, dtype=torch.bool, device=device)
    is_nan_ND[7, 32:] = is_nan_ND[9, :16] = True
    assert torch.equal(back_ND.isnan(), is_nan_ND)
    without_ND = unpack(pack(x_ND.masked_fill(is_nan_ND, 0), format), format, 40, torch.float32)
    assert torch.equal(back_ND.masked_fill(is_nan_ND, 0), without_ND)


@each_kind
def test_empty_and_tiny_rows(kind: LowPrecision) -> None:
    format = WireFormat(kind=kind)
    width = 7 if kind == "int4" else 9
    assert pack(torch.zeros(0, 5), format).shape == (0, width)
    empty_NW = torch.zeros(0, width, dtype=torch.uint8)
    assert unpack(empty_NW, format, 5, torch.float32).shape == (0, 5)
    tiny_ND = torch.full((2, 3), 1e-42)
    assert torch.equal(unpack(pack(tiny_ND, format), format, 3, torch.float32), torch.zeros(2, 3))
    large_ND = torch.tensor([[3e38, -3e38, 1e30]])
    back_ND = unpack(pack(large_ND, format), format, 3, torch.float32)
    torch.testing.assert_close(back_ND[:, :2], large_ND[:, :2])


def test_wrong_arguments() -> None:
    format = WireFormat(kind="int8", block=8)
    with pytest.raises(ValueError, match="block=7 must be even with int4"):
        WireFormat(kind="int4", block=7)
    with pytest.raises(ValueError, match="rows must be floating point"):
        pack(torch.zeros(3, dtype=torch.int64)[:, None], format)
    with pytest.raises(ValueError, match="slot_of_row must be int64"):
        pack(torch.zeros(3, 4), format, torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 32\]"):
        unpack(torch.zeros(3, 27, dtype=torch.uint8), format, 20, torch.float32)
    for op in (pack, by_reference):
        with pytest.raises(RuntimeError, match="slot_of_row"):
            op(torch.zeros(3, 4), format, torch.tensor([6]), 2)


def test_ops_as_torch_wants_them() -> None:
    assert library.is_loaded()
    x_TD, slots_N = torch.randn(6, 10), torch.tensor([3, -1, 0, 11])
    for format in range(len(KINDS)):
        how = (2, format, 4, True, 64, True)
        torch.library.opcheck(torch.ops.moesys.pack, (x_TD, slots_N, *how))
        bytes_NW = torch.ops.moesys.pack(x_TD, slots_N, *how)
        torch.library.opcheck(torch.ops.moesys.unpack, (bytes_NW, x_TD, 10, format, 4))
