"""A second writing of FlashVID in float64, one token at a time."""

from __future__ import annotations

import math

import torch

from .common import LAYERS


def cos(a, b):
    return float(a @ b) / max(float(a.norm() * b.norm()), 1e-12)


def naive_segments(x, threshold, least):
    means = x.mean(1)
    order = sorted(range(len(x) - 1), key=lambda t: (cos(means[t], means[t + 1]), t))
    cuts = [t for t in order if cos(means[t], means[t + 1]) < threshold]
    cuts = order[: max(len(cuts), min(least, len(x)) - 1)]
    ends = [*sorted(t + 1 for t in cuts), len(x)]
    return [list(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]


def naive_diverse(x, weight, count):
    n = len(x)
    d = [[(1 - cos(x[i], x[j])) * weight[j] for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    for _ in range(count):
        left = [j for j in range(n) if j not in chosen]
        among = chosen or None
        value = {j: min(d[i][j] for i in (among or range(n)) if i != j) for j in left}
        chosen.append(max(left, key=lambda j: (value[j], -j)))
    return chosen


def naive_peaks(x, clusters):
    """Centres and the centre of every token."""
    n, k = len(x), min(7, clusters)
    d = [[float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / k) for row in d]

    def above(i, j):  # whether j is denser; nearly equal densities are equal
        return density[j] - density[i] > 1e-9 or (abs(density[j] - density[i]) <= 1e-9 and j < i)

    most = max(map(max, d))
    score = [density[i] * min([d[i][j] for j in range(n) if above(i, j)], default=most) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-round(score[i], 9), i))[:clusters]
    return centres, [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(n)]


def naive_clusters(sizes, most, exact):
    total, every = most * len(sizes), sum(sizes)
    if every <= total:
        return sizes
    if not exact or not total:
        return [math.ceil(n * total / every - 1e-9) for n in sizes]
    out = [min(1, n) for n in sizes]
    left, rest = total - sum(out), [max(0, n - 1) for n in sizes]
    quota = [r * left / sum(rest) for r in rest]
    out = [k + math.floor(q + 1e-9) for k, q in zip(out, quota, strict=True)]
    order = sorted(range(len(sizes)), key=lambda t: (math.floor(quota[t] + 1e-9) - round(quota[t], 9), t))
    for t in order[: total - sum(out)]:
        out[t] += 1
    return out


def naive(tokens, s):
    """{place: value} of what enters the LLM, and the tokens of every tree by its root."""
    frames, size = len(tokens.segments), tokens.segments[0].size
    x = tokens.features[tokens.patch_rows].double().view(frames, size, -1)
    attention = tokens.received_attention(LAYERS - 2).double()
    share = s.budget if isinstance(s.budget, float) else min(1, s.budget / size)
    b = min(size, max(1, math.ceil(size * share * s.expansion - 1e-9)))
    own, exact, out, groups = math.ceil(b * s.alpha - 1e-9), s.rounding == "exact", {}, {}
    for segment in naive_segments(x, s.segment_threshold, s.min_segments):
        mean, free, best = x[segment].mean((0, 1)), {}, {}
        for t in segment:
            weight = [float(attention[t, j]) for j in range(size)]
            if s.selection == "attn_div_v2":
                weight = [w * max(0.0, float(x[t, j] @ mean)) for j, w in enumerate(weight)]
            chosen = naive_diverse(x[t], weight, own)
            out |= {t * size + j: x[t, j] for j in chosen}
            free[t] = [j for j in range(size) if j not in chosen]
        for t in segment[1:]:
            for j in free[t] if free[t - 1] else []:
                p = max(free[t - 1], key=lambda p: cos(x[t, j], x[t - 1, p]))
                if min(1.0, cos(x[t, j], x[t - 1, p])) > s.merge_threshold:
                    best[t, j] = (cos(x[t, j], x[t - 1, p]), (t - 1, p))
        spare = len(segment) * (size - b)
        if len(best) > spare:
            order = sorted(best, key=lambda i: (-best[i][0], i))
            best = {i: best[i] for i in order[: spare if exact else max(0, spare - 1)]}
        members = {(t, j): [] for t in segment for j in free[t] if (t, j) not in best}
        for t in segment:
            for j in free[t]:
                root = (t, j)
                while root in best:
                    root = best[root][1]
                members[root].append((t, j))
        groups |= members
        value = {}
        for root, mine in members.items():
            count = len(mine)
            if s.average == "published":
                count = 1 + sum(1 for i in best if best[i][1] == root)
            value[root] = sum(x[i] for i in mine) / count
        roots = [[r for r in members if r[0] == t] for t in segment]
        counts = naive_clusters([len(r) for r in roots], b - own, exact)
        for mine, count in zip(roots, counts, strict=True):
            if not count:
                continue
            joined = list(range(len(mine)))
            if count < len(mine):
                _, joined = naive_peaks(torch.stack([value[r] for r in mine]), count)
            for c in set(joined):
                parts = [value[r] for r, k in zip(mine, joined, strict=True) if k == c]
                t, j = mine[c]
                out[t * size + j] = sum(parts) / len(parts)
    return out, groups
