"""CUDA: kernels and graphs for CUDA devices only."""
