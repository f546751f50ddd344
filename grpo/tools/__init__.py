"""Commands, each a function."""
