"""Whether the files that a run reads are there, and whether it can write where it should."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from moesys.config.errors import Problem
from moesys.config.schema import RunConfig


def find_file_problems(config: RunConfig) -> Iterator[Problem]:
    if config.data.path:
        yield from _check_data(config)
    yield from _check_run_dir(config.run.dir)
    yield from _check_fresh(config)


def _check_data(config: RunConfig) -> Iterator[Problem]:
    folder = Path(config.data.path)
    source = "stdlib" if folder.name == "stdlib" else "FILES"
    fault = None
    if not folder.is_dir():
        fault = f"and {folder.absolute()} does not exist"
    elif not (folder / "manifest.json").is_file():
        fault = "and it holds no manifest.json"
    else:
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            vocab_size = int(manifest["tokenizer"]["vocab_size"])
            tokens = {split: int(manifest["splits"][split]["tokens"]) for split in ("train", "val")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"and its manifest.json is damaged ({type(error).__name__}: {error})"
        else:
            yield from _check_manifest(config, vocab_size, tokens)
    if fault:
        yield Problem(
            key="data.path",
            given=config.data.path,
            rule=f"must be a folder that moesys prep made, {fault}",
            fix=f"run moesys prep --input {source} --output {folder}, or set data.path to another",
        )


def _check_manifest(
    config: RunConfig, vocab_size: int, tokens: dict[str, int]
) -> Iterator[Problem]:
    if config.model.vocab_size < vocab_size:
        yield Problem(
            key="model.vocab_size",
            given=config.model.vocab_size,
            rule=f"must be at least the {vocab_size} tokens of the tokenizer in {config.data.path}",
            fix=f"use model.vocab_size={vocab_size}",
        )
    # A sample is seq_len inputs and, shifted by one, seq_len targets; a step never repeats one.
    seq_len, batch = config.data.seq_len, config.train.global_batch_tokens
    available = (tokens["train"] - 1) // max(1, seq_len) * seq_len
    if available < batch:
        yield Problem(
            key="train.global_batch_tokens",
            given=batch,
            rule=f"must be at most the {available} tokens of whole samples of data.seq_len={seq_len} "
            f"in {config.data.path}",
            fix="prepare more text, or use a smaller batch or shorter samples",
        )
    if tokens["val"] < 2:
        yield Problem(
            key="data.path",
            given=config.data.path,
            rule=f"must hold at least 2 validation tokens, and it holds {tokens['val']}",
            fix="prepare more text, or raise --val-fraction of moesys prep",
        )


def _check_fresh(config: RunConfig) -> Iterator[Problem]:
    """A run that begins anew beside old checkpoints would be resumed from them later."""
    folder = Path(config.run.dir) / "checkpoints"
    if not config.checkpoint.resume and any(folder.glob("step_*")):
        yield Problem(
            key="checkpoint.resume",
            given=False,
            rule=f"needs a run folder without checkpoints, and {folder} has some",
            fix="set another run.dir, or remove that folder",
        )


def _check_run_dir(run_dir: str) -> Iterator[Problem]:
    existing = Path(run_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield Problem(
            key="run.dir",
            given=run_dir,
            rule=f"must be a folder, and {existing} is a file",
            fix="choose another run.dir or run.name",
        )
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(
            key="run.dir",
            given=run_dir,
            rule=f"must be writable, and {existing} is not",
            fix="choose another run.dir or correct the permissions",
        )
