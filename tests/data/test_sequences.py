"""Documents as sequences: no target lost or doubled, long ones cut, what is not read is refused or skipped by its number.

Shapes: S sequences.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.data.indexed import IndexedTokens
from moesys.data.sequences import find_sequences
from tests.data.files import write_tokens


def documents(folder: Path, lengths: list[int]) -> IndexedTokens:
    """Of so many tokens each; a token tells its position in the stream."""
    ends = np.cumsum([0, *lengths])
    texts = [list(range(a, b)) for a, b in pairwise(ends.tolist())]
    write_tokens(folder / "stream", texts, np.int32)
    return IndexedTokens(folder / "stream")


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda x: max(x) > 1),
    st.integers(1, 50),
)
def test_each_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], longest: int
) -> None:
    tokens = documents(tmp_path_factory.mktemp("data"), lengths)
    found = find_sequences(tokens, longest)
    starts_S, lengths_S = found.starts_and_lengths(np.arange(found.number))
    targets = [
        target
        for start, length in zip(starts_S.tolist(), lengths_S.tolist(), strict=True)
        for target in range(start + 1, start + length + 1)
    ]
    firsts = set(tokens.document_offsets[:-1].tolist())
    assert targets == [t for t in range(sum(lengths)) if t not in firsts]
    assert lengths_S.max() <= longest
    assert lengths_S.min() >= 1
    assert found.num_inputs == len(targets)
    assert found.num_skipped == sum(length < 2 for length in lengths)


def test_long_documents_are_cut_or_skipped(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [12, 4, 1, 0, 6])
    cut = find_sequences(tokens, 5)
    assert [x.tolist() for x in cut.starts_and_lengths(np.arange(cut.number))] == [
        [0, 5, 10, 12, 17],
        [5, 5, 1, 3, 5],
    ]
    skipped = find_sequences(tokens, 5, long_documents="skip")
    assert [x.tolist() for x in skipped.starts_and_lengths(np.arange(2))] == [[12, 17], [3, 5]]
    assert skipped.num_skipped == 3


def test_what_is_refused_is_named_with_its_numbers(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [12, 4, 1, 0, 9])
    with pytest.raises(
        ValueError, match=r"stream\.idx: document 2 has fewer than 2 tokens.* 2 of 5"
    ):
        find_sequences(tokens, 5, empty_documents="refuse")
    with pytest.raises(
        ValueError, match=r"stream\.idx: document 0 has 11 tokens .* data\.seq_len=5, as 2 of 5"
    ):
        find_sequences(tokens, 5, long_documents="refuse")
    with pytest.raises(ValueError, match=r"none of its 5 documents is left: 2 .*, 3 more than"):
        find_sequences(tokens, 2, long_documents="skip")
