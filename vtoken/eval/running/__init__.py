"""Runs a benchmark on a model: asks, logs every answer, resumes, and sums up."""
