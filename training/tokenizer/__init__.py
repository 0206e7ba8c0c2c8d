"""Fits the cell tokenizer."""
