"""CUDA: what only this kind of device has."""
