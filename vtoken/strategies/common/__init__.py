"""Arithmetic that several strategies share: schedules over layers, segments, windows, clusters, scores."""
