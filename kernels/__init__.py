"""Kernels; `rvqa.kernels.ops` is their only entry. Installed as `rvqa.kernels`; its import alone loads no kernel."""
