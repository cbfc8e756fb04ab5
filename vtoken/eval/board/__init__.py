"""Accuracy of strategies at budgets as a table, a page and a plot; and the boards of the tiny models."""
