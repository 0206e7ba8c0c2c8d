"""One runnable module per claim: `python -m bench.NAME [--json]`, from a checkout; not part of the package."""
