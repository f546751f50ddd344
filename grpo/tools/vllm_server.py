"""Start a vLLM server for `rollout.engine: vllm` with `rollout.vllm_mode: server`.

Run it in vLLM's environment (docs/vllm.md). Arguments not listed below go to vLLM unchanged: --port,
--tensor-parallel-size, --data-parallel-size, --gpu-memory-utilization, --max-model-len, ...
"""

import importlib.util
import os
import sys
from pathlib import Path

from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> None:
    """Replace this process by vLLM's server. Raises ConfigError where vLLM is not installed."""
    words = server_command(argv)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not in this environment. docs/vllm.md has the install lines for GPU and CPU")
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    # vLLM offers the endpoints that receive weights in its development mode only.
    os.execve(words[0], words, os.environ | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"})


def server_command(argv: list[str]) -> list[str]:
    """Return vLLM's command line: the settings that training needs, then the user's arguments."""
    parser = command_parser("vllm_server", __doc__)
    parser.add_argument("--model", required=True, help="the model to train: a folder or a hub id (model.name)")
    parser.add_argument("--dtype", default="bfloat16", help="the trainer's mixed precision, or float32 without one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits any machine: private networks only"
    )
    parser.add_argument(
        "--load-format", default="dummy", help="dummy: skip reading weights, because the trainer sends them"
    )
    options, passed_on = parser.parse_known_args(argv)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", options.model, "--dtype", options.dtype, "--host", options.host),
        *("--load-format", options.load_format),
        *("--logprobs-mode", "processed_logprobs"),  # after the temperature; vLLM's default is before
        *("--generation-config", "vllm"),  # ignores the model's own top_k, penalties and stop tokens
        *("--hf-overrides", '{"head_dtype": "float32"}'),  # logits rounded to bfloat16 are off by 1e-2
        *("--worker-extension-cls", "grpo.rollout.vllm_worker.Extension"),
        *("--weight-transfer-config", '{"backend": "grpo"}'),
        *passed_on,
    ]
