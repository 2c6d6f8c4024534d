"""Whether machines can train, and what to do about those that cannot.

A check is a pure judge (facts to findings, every branch tested from facts) and a reader of the facts.
What `host_checks` imports needs no torch; the rest is `torch_checks`, and `cluster` with all that it measures.
"""
