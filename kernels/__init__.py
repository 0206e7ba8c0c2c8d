"""Kernels behind one door, `rvqa.kernels.ops`; installed as `rvqa.kernels`. Importing this package does nothing."""
