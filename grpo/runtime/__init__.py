"""Processes, devices, files, signals, timing."""
