"""Encoders whose layers can be split between attention and MLP: one file per library."""
