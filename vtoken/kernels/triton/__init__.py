"""The Triton kernels, with the signatures of `vtoken.kernels.reference`. Imported on first use only."""

from __future__ import annotations

from .attention import attention_rows, received_attention
from .cover import greedy_cover
from .gather import gather_merge, gather_rows, kv_compact_, kv_gather
from .pack import pack_codes, unpack_rows
from .select import bipartite_match, farthest_point, greedy_map

__all__ = [
    "attention_rows",
    "bipartite_match",
    "farthest_point",
    "gather_merge",
    "gather_rows",
    "greedy_cover",
    "greedy_map",
    "kv_compact_",
    "kv_gather",
    "pack_codes",
    "received_attention",
    "unpack_rows",
]
