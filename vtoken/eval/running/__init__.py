"""Runs a benchmark on a model: asks, writes every answer to disk, resumes, and sums up."""
