"""Accuracy against kept visual tokens: benchmarks, protocols, runs, boards and other harnesses."""
