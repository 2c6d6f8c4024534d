"""The benchmark of a codec's parts: its structured map is what it should be, and it runs."""

import torch

from benchmarks import codec
from benchmarks.codec import hadamard_maps


def test_the_structured_map_is_orthogonal_and_mixes() -> None:
    generator = torch.Generator().manual_seed(0)
    d = 64
    signs_3D = torch.randint(0, 2, (3, d), generator=generator).double() * 2 - 1
    map_DD = hadamard_maps(torch.eye(d, dtype=torch.float64), signs_3D, d)
    torch.testing.assert_close(map_DD @ map_DD.T, torch.eye(d, dtype=torch.float64))
    # Sylvester's matrix, by its recursion.
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while sylvester.shape[0] < d:
        sylvester = torch.cat(
            [torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)]
        )
    expected_DD = torch.eye(d, dtype=torch.float64)
    for signs_D in signs_3D:
        expected_DD = expected_DD * signs_D @ sylvester / d**0.5
    torch.testing.assert_close(map_DD, expected_DD)
    assert map_DD.abs().max() < 0.6, "no number of a token counts for much"


def test_a_smoke_run() -> None:
    result = codec.run(True, lambda line: None)
    (row,) = result.rows
    assert 0 < row["rows_pct"] < 100
    assert set(result.headline) == {
        "codec_pct_of_experts",
        "wire_pct_of_experts",
        "structured_over_product",
    }
    assert all(value > 0 for value in result.headline.values())
