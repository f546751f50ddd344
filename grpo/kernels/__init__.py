"""Kernels: the only device-specific arithmetic of the trainer. README.md has the contract."""
