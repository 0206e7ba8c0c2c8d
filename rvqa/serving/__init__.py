"""Adapters of `rvqa.grammar` to generation engines; no grammar logic of their own."""
