"""Our reader and megatron-core's agree on files that megatron-core's own writer made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesys.data.indexed import IndexedTokens

megatron: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, documents: list[list[list[int]]], dtype: Any) -> None:
    """Documents of sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_same_tokens_and_documents(tmp_path: Path, dtype: Any) -> None:
    random = np.random.default_rng(0)
    documents = [
        [
            random.integers(0, 120, random.integers(1, 40)).tolist()
            for _ in range(random.integers(1, 4))
        ]
        for _ in range(200)
    ]
    write(tmp_path / "t", documents, dtype)
    ours = IndexedTokens(tmp_path / "t", vocab_size=120)
    theirs = megatron.IndexedDataset(str(tmp_path / "t"))
    assert ours.tokens_N.dtype == theirs[0].dtype
    assert np.array_equal(ours.tokens_N, np.concatenate(theirs[:]))
    assert ours.num_documents == len(theirs.document_indices) - 1 == 200
    starts = np.concatenate([[0], np.cumsum(theirs.sequence_lengths.astype(np.int64))])
    assert np.array_equal(ours.document_offsets, starts[theirs.document_indices])
    for d in range(200):
        start, end = ours.document_offsets[d : d + 2]
        assert ours.tokens_N[start:end].tolist() == [t for s in documents[d] for t in s]


def test_multimodal_files_are_refused(tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path / 't'}.bin", multimodal=True)
    builder.add_document(np.array([1, 2, 3]), [3], [0])
    builder.finalize(f"{tmp_path / 't'}.idx")
    with pytest.raises(ValueError, match="multimodal"):
        IndexedTokens(tmp_path / "t")
