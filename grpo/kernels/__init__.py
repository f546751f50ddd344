"""Kernels: the only device-specific arithmetic. The contract is in README.md."""
