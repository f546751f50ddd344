"""Export a run: a merged model, its LoRA adapter alone, or a folder that Ollama turns into a GGUF by itself.

python launch/export.py --run DIR --format merged|adapter|gguf-ready [--output DIR] [--step N]

From final/, or with --step from any checkpoint (a run that was stopped can be exported too).
"""

import argparse
from pathlib import Path

from grpo.errors import run_main

NEXT = {
    "merged": 'from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained("{folder}")',
    "adapter": "vllm serve BASE --enable-lora --lora-modules mine={folder}",
    "gguf-ready": "ollama create mine -f {folder}/Modelfile",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    parser.add_argument("--format", required=True, choices=["merged", "adapter", "gguf-ready"])
    parser.add_argument("--output", type=Path, help="where to write it; default: RUN/export/FORMAT")
    parser.add_argument("--step", type=int, help="export this checkpoint instead of final/")
    arguments = parser.parse_args()
    from grpo.export import export

    folder = export(arguments.run, arguments.format, arguments.output, arguments.step)
    print(f"{folder}\nUse it: {NEXT[arguments.format].format(folder=folder)}")


if __name__ == "__main__":
    run_main(main)
