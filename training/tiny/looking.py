"""Attention targets inside the language model, in training only: a question's end looks at what it names.

Among some twenty objects, answers alone teach slowly which visual tokens a question is about. So the first
head of some layers is asked to put its attention, from the last token before the answer, on those tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtoken.mechanism.attention_rows import rotate


class Look(nn.Module):
    """Reads the attention of the first head of some layers of a Llama, at a few positions.

    Args:
        model: a LLaVA-like model whose language model is a Llama or its like.
        layers: of the language model, counted from 0.
        prefix: tokens before the visual tokens.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], prefix: int = 2) -> None:
        super().__init__()
        attentions = [model.model.language_model.layers[i].self_attn for i in layers]
        self.prefix = prefix
        self.seen: list[tuple[Any, dict[str, Any]]] = []
        self.hooks = [a.register_forward_pre_hook(self._keep, with_kwargs=True) for a in attentions]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def _keep(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append((attention, kwargs))

    def forward(self, goal: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Divergence of the rows of the last forward pass from their targets, and their share on the targets.

        Args:
            goal: ``at``, positions of the queries after the visual tokens, ``(n, slots)``, -1 for none;
                ``shows``, the visual tokens of each, ``(n, slots, tokens)`` bool: none stands for
                the prompt's first token.
        """
        seen, self.seen = self.seen, []
        length = seen[0][1]["hidden_states"].shape[1]
        at, shows = (goal[name].to(seen[0][1]["hidden_states"].device) for name in ("at", "shows"))
        after = length - self.prefix - shows.shape[-1]
        wanted = nn.functional.pad(shows, (self.prefix, after))
        wanted[..., 0] = ~shows.any(-1)
        where = at.clamp(min=0) + self.prefix + shows.shape[-1]
        found = torch.stack([(_rows(a, given, where) * wanted).sum(-1)[at >= 0] for a, given in seen])
        return -found.clamp(min=1e-20).log().mean(), {"look": found.mean().item()}


def _rows(attention: Any, kwargs: dict[str, Any], at: torch.Tensor) -> torch.Tensor:
    """Attention of the first head at positions ``at`` ``(n, slots)``: ``(n, slots, length)`` float32."""
    hidden, size = kwargs["hidden_states"], attention.head_dim
    key = hidden @ attention.k_proj.weight[:size].T
    some = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
    query = some @ attention.q_proj.weight[:size].T
    cos, sin = (part.expand(len(hidden), -1, -1) for part in kwargs["position_embeddings"])
    where = at[..., None].expand(-1, -1, size)
    key = rotate(key[:, None], cos, sin)[:, 0]
    query = rotate(query[:, None], cos.gather(1, where), sin.gather(1, where))[:, 0]
    mask = kwargs["attention_mask"][:, 0].expand(len(hidden), -1, -1)
    mask = mask.gather(1, at[..., None].expand(-1, -1, mask.shape[-1]))
    return (query @ key.mT * attention.scaling + mask).float().softmax(-1)
