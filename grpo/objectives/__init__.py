"""Published variants of the objective."""
