"""Parts into the final files, through megatron-core's own writer, with the figures of the manifest.

Shapes: V ids of the vocabulary, D documents.
"""

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesys.data.corpus import hash_file
from moesys.data.manifest import FILE as MANIFEST
from moesys.data.manifest import DataManifest, LengthHistogram, SplitInfo, TokenizerInfo
from moesys.data.parts import SPLITS, Counts, PartJob, Split, read_part
from moesys.data.tokenizer import eod_id, load_tokenizer, token_bytes

OUTPUT_FILES = ("tokenizer.json", "token_bytes.npy", "train.bin", "train.idx", "val.bin", "val.idx")


class EmptySplit(ValueError):
    """No documents for one side of the split, or none at all."""


def assemble(
    jobs: Sequence[PartJob],
    output: Path,
    work: Path,
    *,
    arguments: dict[str, Any],
    identity: dict[str, Any],
) -> DataManifest:
    """Write all files of `output`, manifest.json last, from the parts of `jobs`; each beside and renamed.

    Raises:
        EmptySplit: there is nothing to train on, or nothing to hold out.
        ValueError: a part file is damaged (it is removed, so that the next run makes it again).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPU packages that writing files has no use for
        # Seconds to import, so only here and only when there is something to write.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(jobs[0].tokenizer_path)
    bytes_V = token_bytes(tokenizer, jobs[0].tokenizer_path)
    np.save(work / "token_bytes.npy", bytes_V)
    dtype = DType.optimal_dtype(bytes_V.size)
    builders: dict[Split, Any] = {
        split: IndexedDatasetBuilder(str(work / f"{split}.bin"), dtype=dtype) for split in SPLITS
    }
    counts = Counts.zero()
    tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    lengths_log2: dict[Split, np.ndarray] = {split: np.zeros(64, np.int64) for split in SPLITS}
    train_counts_V = np.zeros(bytes_V.size, np.int64)
    train_byte_counts = np.zeros(256, np.int64)
    for job in jobs:
        part = read_part(job.path)
        if part is None:
            job.path.unlink(missing_ok=True)
            raise ValueError(f"{job.path}: a damaged part, now removed: run the same command again")
        for split in SPLITS:
            ends = np.cumsum(part.lengths_D[split]).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                builders[split].add_document(part.tokens_N[split][start:end], [end - start])
            tokens[split] += part.tokens_N[split].size
            # frexp(n) = (m, e) with n = m * 2**e and 1/2 <= m < 1, so e - 1 = floor(log2 n), exactly.
            floor_log2 = np.frexp(part.lengths_D[split].astype(np.float64))[1] - 1
            lengths_log2[split] += np.bincount(floor_log2, minlength=64)
        train_counts_V += np.bincount(part.tokens_N["train"], minlength=bytes_V.size)
        train_byte_counts += part.train_byte_counts
        counts.add(part.counts)
    for split, builder in builders.items():
        builder.finalize(str(work / f"{split}.idx"))
    _require_documents(counts, arguments)
    manifest = DataManifest(
        tokenizer=TokenizerInfo(
            file="tokenizer.json",
            vocab_size=bytes_V.size,
            eod_id=eod_id(tokenizer, jobs[0].eod_token, jobs[0].tokenizer_path),
            xxh3=hash_file(work / "tokenizer.json"),
        ),
        token_bytes="token_bytes.npy",
        splits={
            split: SplitInfo(
                bin=f"{split}.bin",
                idx=f"{split}.idx",
                documents=counts.documents[split],
                tokens=tokens[split],
                bytes=counts.text_bytes[split],
                bin_bytes=(work / f"{split}.bin").stat().st_size,
                xxh3_bin=hash_file(work / f"{split}.bin"),
                xxh3_idx=hash_file(work / f"{split}.idx"),
                length_histogram=_histogram(lengths_log2[split]),
            )
            for split in SPLITS
        },
        unigram_bits_per_byte=entropy_bits(train_counts_V)
        * tokens["train"]
        / counts.text_bytes["train"],
        byte_entropy_bits=entropy_bits(train_byte_counts),
        skipped={**counts.skipped, "first": counts.skipped_names},
        arguments=arguments,
        identity=identity,
    )
    for name in OUTPUT_FILES:
        source = work / name
        if name == "tokenizer.json":  # a run killed here still needs it for its parts
            source = Path(shutil.copyfile(source, work / "tokenizer.tmp"))
        _sync(source)
        os.replace(source, output / name)
    write_json(output / MANIFEST, manifest.to_json())
    return manifest


def require_megatron() -> None:
    """Fail before the work, not after it. Raises ValueError if megatron-core is not installed."""
    try:
        found = importlib.util.find_spec("megatron.core")
    except ImportError:
        found = None
    if found is None:
        raise ValueError(
            "writing .bin/.idx files needs megatron-core, which is not installed: pip install 'moesys[megatron]'"
        )


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of the distribution that these counts estimate, in bits; 0 if there are none."""
    present = counts[counts > 0].astype(np.float64)
    shares = present / present.sum() if present.size else present
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0: no minus zero


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Beside, flushed to disk, renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    _sync(beside)
    os.replace(beside, path)


def _require_documents(counts: Counts, arguments: dict[str, Any]) -> None:
    total = sum(counts.documents.values())
    skipped = (
        ", ".join(f"{count} {reason}" for reason, count in sorted(counts.skipped.items())) or "none"
    )
    if total == 0:
        first = f" (first: {counts.skipped_names[0]})" if counts.skipped_names else ""
        raise EmptySplit(
            f"no documents in the inputs; skipped: {skipped}{first}: "
            f"check --input, --include and --jsonl-key ({arguments['jsonl_key']!r})"
        )
    for split in SPLITS:
        if counts.text_bytes[split] == 0:
            raise EmptySplit(
                f"the {split} split is empty: --val-fraction {arguments['val_fraction']} of {total} documents with "
                f"--seed {arguments['seed']}: documents are never cut, so give more of them (JSONL: one per line), "
                "or change --val-fraction or --seed"
            )


def _histogram(log2_counts: np.ndarray) -> LengthHistogram:
    used = int(np.flatnonzero(log2_counts)[-1]) + 1
    return LengthHistogram(
        edges_tokens=[1 << k for k in range(used + 1)], documents=log2_counts[:used].tolist()
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
