"""Start a vLLM server for `rollout.engine: vllm`, `rollout.vllm_mode: server`: python launch/vllm_server.py --model MODEL

Run it in vLLM's environment (docs/vllm.md), which needs nothing of the trainer's. Flags other than those below go on to vLLM:
--port, --tensor-parallel-size, --data-parallel-size, --gpu-memory-utilization, --max-model-len, ...
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(argv: list[str]) -> list[str]:
    """vLLM's command line, with what training needs and a user would have to know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model that is trained: a folder or hub id (model.name)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="what the trainer computes in: its mixed precision, else float32"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="any machine is let in by 0.0.0.0: only in a network of your own"
    )
    parser.add_argument(
        "--load-format", default="dummy", help="dummy: do not read weights that the trainer sends anyway"
    )
    ours, theirs = parser.parse_known_args(argv)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", ours.model, "--dtype", ours.dtype, "--host", ours.host, "--load-format", ours.load_format),
        *("--logprobs-mode", "processed_logprobs"),  # after the temperature; vLLM's default is before
        *("--generation-config", "vllm"),  # not the model's own top_k, penalties and stop tokens
        *("--hf-overrides", '{"head_dtype": "float32"}'),  # logits rounded to bfloat16 are off by 1e-2
        *("--worker-extension-cls", "grpo.rollout.vllm_worker.Extension"),
        *("--weight-transfer-config", '{"backend": "grpo"}'),
        *theirs,
    ]


def main() -> None:
    words = command(sys.argv[1:])
    if importlib.util.find_spec("vllm") is None:
        sys.exit("error: vLLM is not in this environment. docs/vllm.md has the install lines for GPU and CPU")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Without the development mode, vLLM has no endpoints for weights.
    os.execve(words[0], words, os.environ | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"})


if __name__ == "__main__":
    main()
