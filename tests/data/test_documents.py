"""Lengths of documents, from an index."""

from pathlib import Path

import pytest

from moesys.data.documents import document_lengths
from tests.data.files import write_tokens

LENGTHS = [4, 1, 3, 9, 2]
INPUTS = [3, 2, 8, 1]
"""A document of one token has none."""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "train", [list(range(length)) for length in LENGTHS])
    return tmp_path / "train"


def lengths_of(prefix: Path, tokens: int, **options) -> list[int]:
    options = {"seed": 0, "shuffle": False} | options
    return document_lengths({"": prefix}, {"": 1.0}, tokens, **options).tolist()


def test_whole_documents_up_to_the_batch(prefix: Path) -> None:
    assert lengths_of(prefix, 1000) == INPUTS
    assert lengths_of(prefix, 12) == INPUTS[:2]
    assert lengths_of(prefix, 13) == INPUTS[:3]
    assert lengths_of(prefix, 1) == INPUTS[:1]


def test_the_seed_fixes_the_order(prefix: Path) -> None:
    orders = [tuple(lengths_of(prefix, 1000, seed=seed, shuffle=True)) for seed in range(20)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(INPUTS))}
    assert len(set(orders)) > 5
    assert tuple(lengths_of(prefix, 1000, seed=7, shuffle=True)) == orders[7]


def test_each_source_has_its_share(tmp_path: Path) -> None:
    for name, length in (("short", 3), ("long", 11)):
        write_tokens(tmp_path / name, [[0] * length] * 50)
    prefixes = {name: tmp_path / name for name in ("long", "short")}
    weights = {"long": 3.0, "short": 1.0}
    found = document_lengths(prefixes, weights, 80, seed=0, shuffle=True)
    assert found.tolist() == [10] * 6 + [2] * 10


def test_an_index_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.idx: byte 0: there is no such file"):
        lengths_of(tmp_path / "none", 10)
