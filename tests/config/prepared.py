"""A data folder as far as the checks of a configuration look at it."""

import json
from pathlib import Path


def prepared_data(
    folder: Path, *, vocab_size: int = 2048, train_tokens: int = 10**6, val_tokens: int = 10**4
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "tokenizer": {"vocab_size": vocab_size},
        "splits": {"train": {"tokens": train_tokens}, "val": {"tokens": val_tokens}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
