"""Rollouts: prompts -> groups of completions."""
