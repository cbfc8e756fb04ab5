"""Accuracy against kept visual tokens: ``python -m vtoken.eval tiny``."""

from __future__ import annotations
