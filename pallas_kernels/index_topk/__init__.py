"""Index scores of compressed entries and the exact top-k of the visible ones."""

from pallas_kernels.index_topk.reference import index_scores, pick_entries
from pallas_kernels.index_topk.tpu import index_topk_tpu
from pallas_kernels.index_topk.tpu_lists import indices_from_bits_tpu
from pallas_kernels.index_topk.xla import pick_entries_xla

__all__ = ["index_scores", "index_topk_tpu", "indices_from_bits_tpu", "pick_entries", "pick_entries_xla"]
