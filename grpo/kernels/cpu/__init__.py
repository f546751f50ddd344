"""CPU kernels: in C where a compiler is available, else in PyTorch."""
