"""Train a model: accelerate launch [--config_file accelerate_configs/X.yaml] launch/train.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("train")
