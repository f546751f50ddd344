"""Built-in trackers, one module each, found by grpo.tracking.tracker.TRACKERS."""
