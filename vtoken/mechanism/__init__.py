"""Shorten the sequence of visual tokens inside unmodified transformers models."""
