"""Train. accelerate launch [--config_file accelerate_configs/X.yaml] launch/train.py [--config FILE ...] [--key.subkey VALUE]"""

from grpo.config import load_config
from grpo.errors import run_main


def main() -> None:
    config = load_config()  # before torch is imported: a mistake in the config is told at once
    from accelerate.state import PartialState

    from grpo.trainer import train

    try:
        train(config)
    finally:
        if PartialState._shared_state:  # a process group that is left open aborts the process at exit
            PartialState().destroy_process_group()


if __name__ == "__main__":
    run_main(main)
