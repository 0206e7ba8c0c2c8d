"""Raw counts as `rvqa.data.counts.read_counts` finds them, before it checks the library size of every cell."""

from rvqa.data.counts import _read
from rvqa.data.reading import Reading


def raw_counts(adata, *, layer=None, recover=False):
    """Return counts as canonical CSR."""
    return _read(adata, Reading(layer, recover=recover)).counts


def counts_and_var(adata, *, layer=None, recover=False):
    """Return counts, and the table of genes of their columns."""
    found = _read(adata, Reading(layer, recover=recover))
    return found.counts, found.var
