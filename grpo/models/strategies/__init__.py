"""Distribution strategies: one class per way to distribute a model over processes."""
