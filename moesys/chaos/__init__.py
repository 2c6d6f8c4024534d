"""Faults on purpose: what to inject, the hand inside a rank that does it, and the eye outside that measures."""
