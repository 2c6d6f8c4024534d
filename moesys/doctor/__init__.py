"""Whether machines can train, and what to do about those that cannot.

A check is a pure judge (facts to findings, every branch tested from facts) and a reader of the facts.
Modules that import torch: `torch_build`, `exchange`, `checkpoint`, `gemm`, `links`, `cluster`; no other does.
"""
