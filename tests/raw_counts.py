"""Raw counts as `rvqa.data.counts.read_counts` finds them, before it asks for a library size of every cell."""

from rvqa.data.counts import _read


def raw_counts(adata, *, layer=None, recover=False):
    """Counts, canonical CSR."""
    return _read(adata, layer, None, recover=recover).counts


def counts_and_var(adata, *, layer=None, recover=False):
    """Counts, and the table of genes of their columns."""
    found = _read(adata, layer, None, recover=recover)
    return found.counts, found.var
