"""Codecs: what travels in the place of tokens."""

from moesys.moe.codecs.lsh import LshCodec
from moesys.moe.codecs.tree import TreeCodec

__all__ = ["LshCodec", "TreeCodec"]
