"""Cells: counts, genes, depth and columns, from an AnnData or from files."""
