"""Backend `cuda`: CUDA C++."""
