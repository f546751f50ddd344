"""Published losses, advantage estimators and subsets beyond those of grpo/losses.py and grpo/advantages.py."""
