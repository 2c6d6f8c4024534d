"""Steps of large clusters under our costs, by policy: the setting of ByteScale's evaluation (2502.21231, section 7)."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.balance.corpora import Lengths, heavy_tail
from benchmarks.balance.speed import OURS, STATIC
from benchmarks.results import Cell
from moesys.config.compose import compose
from moesys.plan.batch.cost import BatchCosts, costs_of
from moesys.plan.batch.figures import figures
from moesys.plan.batch.policies import batch_seconds, planned

POLICIES = (STATIC, "karmarkar_karp", "naive", OURS)
CLUSTER_RANKS = 1024
CAPACITY_TOKENS, LONGEST_TOKENS, BATCH_TOKENS = 8192, 2 << 20, 32 << 20
FLOPS_PER_S, BYTES_PER_S, HOP_S = 4e14, 4e10, 1e-5
"""Of an H100 with a 400 Gbit/s port, assumed."""
CORPORA: Mapping[str, Lengths] = {
    "9.8 % long": partial(heavy_tail, long_share=0.098),
    "37 % long": partial(heavy_tail, long_share=0.37),
}


def paper_costs() -> BatchCosts:
    """Of a dense decoder of 7 billion parameters: Mixtral's, without its experts."""
    layers = compose(["model=mixtral_8x7b"]).model.num_layers
    model = compose(["model=mixtral_8x7b", f"model.num_dense_layers={layers}"]).model
    return costs_of(model, FLOPS_PER_S, bytes_per_s=BYTES_PER_S, hop_s=HOP_S)


def simulated_rows(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    """A row for each corpus, place where ranks meet, and policy."""
    costs = paper_costs()
    ranks = 64 if quick else CLUSTER_RANKS
    scale = CLUSTER_RANKS // ranks
    rows: list[dict[str, Cell]] = []
    for corpus, lengths in CORPORA.items():
        lengths_S = lengths(BATCH_TOKENS // scale, LONGEST_TOKENS // scale)
        for meets in (False, True):
            took: dict[str, float] = {}
            for policy in POLICIES:
                began_s = time.process_time()
                plan = planned(policy, lengths_S, ranks, CAPACITY_TOKENS, costs, meets=meets)
                plan_s = time.process_time() - began_s
                took[policy] = batch_seconds(plan, costs, meets=meets)
                found = figures(plan, costs, took[policy], block_token_bytes=0.0)
                rows.append(
                    {
                        "cluster": f"{ranks} ranks, {LONGEST_TOKENS // scale} tokens",
                        "corpus": corpus,
                        "meet": "in layers" if meets else "in rings",
                        "policy": policy,
                        "step_s": round(took[policy], 3),
                        "speedup": round(took[STATIC] / took[policy], 2),
                        "over_even": round(found.over_even, 3),
                        "idle_pct": round(100 * found.idle_share, 1),
                        "keys_pct": round(100 * found.keys_share, 1),
                        "micro_steps": found.micro_steps,
                        "plan_s": round(plan_s, 3),
                    }
                )
                progress(f"{corpus}, {policy}: {rows[-1]['speedup']} times as fast as {STATIC}")
    return rows
