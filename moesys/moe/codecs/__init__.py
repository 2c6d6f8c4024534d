"""Codecs: what travels in the place of tokens."""

from moesys.moe.codecs.lsh import LshCodec

__all__ = ["LshCodec"]
