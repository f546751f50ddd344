"""TRL's interface on this trainer: GRPOConfig, GRPOTrainer, and the migration of scripts."""
