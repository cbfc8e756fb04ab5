"""Recipes of the tiny encoders, ``clip`` and ``vit``: ``python -m training.tiny.encoders vit``.

A recipe has

- ``build() -> (model, preprocess, tokenizer, config)``: the untrained model and its ``config.json``;
- ``train(model, preprocess, tokenizer, log, seed, **limits)``: all stages, in place, through
  `training.tiny.loop.optimise`; ``limits`` are its keywords ``seconds``, ``workers``, ``keep`` and (for
  tests) ``steps`` and ``checks`` of each stage;
- ``measure(model, preprocess, tokenizer, n) -> dict``: figures of its card;
- ``card(report, log) -> str``: its card in Markdown.
"""

from __future__ import annotations
