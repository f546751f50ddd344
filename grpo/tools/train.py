"""The command `grpo train`: config files and flags -> a training run."""

from grpo.config.parser import load_config


def main(argv: list[str]) -> None:
    """Run the command. Raises ConfigError before torch is imported where the config is wrong."""
    config = load_config(argv)
    from grpo.trainer import train

    train(config)
