"""C++ for CPU tensors."""
