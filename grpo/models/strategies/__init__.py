"""Distribution strategies: one class per way to spread a model over processes."""
