"""Boxes: intersection and cutting against the brute-force answer on index sets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.checkpoint.region import Region


@st.composite
def regions(draw: st.DrawFn, ndim: int) -> Region:
    offsets = tuple(draw(st.integers(0, 4)) for _ in range(ndim))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(ndim))
    return Region(offsets=offsets, shape=shape)


def mask(region: Region) -> torch.Tensor:
    """The region as a set of indices of a tensor that holds all of them."""
    whole = torch.zeros((10,) * len(region.shape), dtype=torch.bool)
    whole[region.within(Region.whole(tuple(whole.shape)))] = True
    return whole


@given(st.data(), st.integers(0, 3))
def test_intersection_is_the_common_index_set(data: st.DataObject, ndim: int) -> None:
    a, b = data.draw(regions(ndim)), data.draw(regions(ndim))
    common, expected = a.intersect(b), mask(a) & mask(b)
    assert (common is None) == (not expected.any())
    if common is not None:
        assert torch.equal(mask(common), expected)
        assert torch.equal(torch.ones(a.shape)[common.within(a)], torch.ones(common.shape))


@given(st.data(), st.integers(0, 3), st.integers(0, 30))
def test_split_tiles_the_region_in_contiguous_parts(
    data: st.DataObject, ndim: int, max_numel: int
) -> None:
    region = data.draw(regions(ndim))
    parts = region.split(max_numel)
    if region.numel:
        assert all(0 < part.numel <= max(1, max_numel) for part in parts)
    content = torch.arange(region.numel).reshape(region.shape)
    # Row-major contiguous parts, in order: their concatenation is the region itself.
    assert torch.equal(
        torch.cat([content[part.within(region)].flatten() for part in parts]), content.flatten()
    )
