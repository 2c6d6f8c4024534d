"""Runs side by side: the same job with different settings and seeds, one after the other on this machine."""
