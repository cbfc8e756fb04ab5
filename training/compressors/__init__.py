"""Recipes for the strategies with weights that ship for the tiny models."""
