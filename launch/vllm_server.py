"""Start a vLLM server for training: python launch/vllm_server.py --help. vLLM's environment may lack the trainer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.cli import run  # noqa: E402

if __name__ == "__main__":
    run("vllm_server")
