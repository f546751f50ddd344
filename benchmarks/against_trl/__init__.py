"""The comparison with TRL on the same work, for launch/benchmark.py."""
