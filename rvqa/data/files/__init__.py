"""Cells of files of any size and kind."""
