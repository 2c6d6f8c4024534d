"""Check every byte of a checkpoint without a model to load it into."""

from collections.abc import Callable
from pathlib import Path

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.shards import ShardReader


def verify(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Read and hash everything in the step folder `path`; return what is wrong, with file and tensor.

    `on_progress(bytes_done, bytes_total)` is called after every chunk.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    total_bytes = sum(record.num_bytes for record in manifest.tensors.values())
    with ShardReader(path, manifest) as reader:
        bad_sizes = {file: reader.size_problem(file) for file in sorted(manifest.file_bytes)}
        problems = [problem for problem in bad_sizes.values() if problem]
        for name, record in manifest.tensors.items():
            for chunk in record.chunks:
                if bad_sizes[chunk.file]:
                    continue
                try:
                    reader.chunk(name, chunk)
                except CheckpointError as error:
                    problems.append(str(error))
                on_progress(reader.bytes_read, total_bytes)
    return problems
