"""Index scores of compressed entries and the exact top-k of the visible ones."""

from pallas_kernels.index_topk.reference import index_scores, pick_entries
from pallas_kernels.index_topk.xla import pick_entries_xla

__all__ = ["index_scores", "pick_entries", "pick_entries_xla"]
