"""Adapters of `rvqa.language.grammar` to generation engines; no grammar logic of their own."""
