"""Triton for CUDA tensors."""
