"""Train. accelerate launch [--config_file accelerate_configs/X.yaml] launch/train.py [--config FILE ...] [--key.subkey VALUE]"""

from grpo.config.parser import load_config
from grpo.runtime.command import run_main


def main() -> None:
    config = load_config()  # before torch is imported: a mistake in the config is told at once
    from grpo.trainer import train

    train(config)


if __name__ == "__main__":
    run_main(main)
