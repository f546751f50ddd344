"""A training run: building, state, records, resume."""
