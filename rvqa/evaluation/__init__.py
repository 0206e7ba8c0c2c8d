"""Splits, baselines and metrics; each exists once, here."""
