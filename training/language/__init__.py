"""Trains the language model."""
