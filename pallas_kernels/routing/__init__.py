"""Which experts a token goes to, and the rows that its choices take in blocks of one expert each."""

from pallas_kernels.routing.reference import (
    Blocks,
    ExpertRows,
    arrange_pairs,
    by_expert,
    compare_blocks,
    count_blocks,
    route,
    routing_weights,
)
from pallas_kernels.routing.tpu import MOST_COMPARED, arrange_pairs_tpu, route_tpu

__all__ = [
    "MOST_COMPARED",
    "Blocks",
    "ExpertRows",
    "arrange_pairs",
    "arrange_pairs_tpu",
    "by_expert",
    "compare_blocks",
    "count_blocks",
    "route",
    "route_tpu",
    "routing_weights",
]
