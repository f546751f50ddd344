"""Reward functions, their registry, and the worker pool that runs them."""
