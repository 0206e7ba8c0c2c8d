"""One runnable module per claim: `python -m bench.NAME [--json]` in a checkout. The package does not include it."""
