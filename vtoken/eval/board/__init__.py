"""Accuracy of strategies at budgets, as a table, a page and a plot; and the board of the tiny models."""
