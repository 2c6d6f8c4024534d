"""What records and files of a run say of its sources of text. Pure.

A source without a name is the only one, of which there is nothing to say.
"""

from collections.abc import Mapping
from typing import Any

from moesys.config.schema import RunConfig
from moesys.data.loader import TokenLoader
from moesys.data.manifest import DataManifest
from moesys.data.sequence_loader import SequenceLoader


def planned_epochs(config: RunConfig, loader: TokenLoader | SequenceLoader) -> dict[str, Any]:
    """For a start record: of each source its weight, and the epochs it will have had after the last step, if that stays."""
    tokens = config.train.steps * config.train.global_batch_tokens - loader.consumed_tokens
    left_samples = max(0.0, loader.samples_in(tokens))
    read = loader.consumed_of_sources()
    found = {
        source.name: {
            "weight": weight,
            "epochs": (read[source.name] + left_samples * weight) / order.num_samples,
        }
        for source, weight, order in zip(
            loader.sources, loader.mix.weights_N, loader.orders, strict=True
        )
        if source.name
    }
    return {"sources": found} if found else {}


def step_fields(loader: TokenLoader | SequenceLoader) -> dict[str, Any]:
    """For a train record: the weights that the next step reads with, the tokens of each source so far, and how the step was planned."""
    weights = {s.name: w for s, w in zip(loader.sources, loader.mix.weights_N, strict=True)}
    planned = loader.plan_fields() if isinstance(loader, SequenceLoader) else {}
    if "" in weights:
        return planned
    mixed = {"weight_by_source": weights, "tokens_by_source": loader.tokens_of_sources()}
    return mixed | planned


def text_entropies(config: RunConfig, manifests: Mapping[str, DataManifest]) -> dict[str, float]:
    """Bits per byte of models without context, one for each source, on text mixed as configured."""
    splits = [manifest.splits["train"] for manifest in manifests.values()]
    weights = config.data.weights
    bytes_N = [w * split.bytes / split.tokens for w, split in zip(weights, splits, strict=True)]
    shares_N = [nbytes / sum(bytes_N) for nbytes in bytes_N]
    return {
        key: sum(s * getattr(m, key) for s, m in zip(shares_N, manifests.values(), strict=True))
        for key in ("unigram_bits_per_byte", "byte_entropy_bits")
    }


def data_manifest(config: RunConfig, manifests: Mapping[str, DataManifest]) -> dict[str, Any]:
    """Of data_manifest.json: the folder's own, or those of all sources with what the page needs of them together."""
    if "" in manifests:
        return manifests[""].to_json()
    sources = {name: manifest.to_json() for name, manifest in manifests.items()}
    return {**text_entropies(config, manifests), "sources": sources}
