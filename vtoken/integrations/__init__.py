"""Serving engines in which vtoken runs."""
