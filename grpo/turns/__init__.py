"""Several turns: what follows a completion (tool results, messages of an environment), and its tokens."""
