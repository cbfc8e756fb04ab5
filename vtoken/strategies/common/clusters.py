"""Clustering by density peaks with k nearest neighbours, deterministic."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, clusters: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Clusters of DPC-KNN (Du et al. 2016) in the form that SparseVLM and FlashVID use.

    The density of a token comes from its nearest `clusters` tokens, itself among them, or from `most` if
    these are fewer. Equal densities, and equal products of density and distance, go to the lower index; the
    public code draws noise.

    Args:
        x: (q, d) features. clusters: number c, 1 to q.

    Returns:
        centres (c,) int64, the most prominent first, and the cluster of every token (q,) int64, 0 to c - 1.
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    near = distance.topk(min(clusters, most or clusters), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    index = torch.arange(len(x), device=x.device)
    # denser, or as dense and earlier
    above = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (index[None] < index[:, None])
    )
    delta = distance.masked_fill(~above, torch.inf).amin(-1)
    delta = torch.where(above.any(-1), delta, distance.max())
    centres = (density * delta).sort(descending=True, stable=True).indices[:clusters]
    cluster = distance[:, centres].argmin(-1)
    cluster[centres] = torch.arange(clusters, device=x.device)
    return centres, cluster
