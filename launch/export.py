"""Export a run: a merged model, its LoRA adapter alone, or a folder that Ollama turns into a GGUF by itself.

python launch/export.py --run DIR --format merged|adapter|gguf-ready [--output DIR] [--step N]
                        [--licence apache-2.0] [--push OWNER/NAME [--public]]

From final/, or with --step from any checkpoint (a run that was stopped can be exported too). A model card with the run's settings,
evaluation and data is put beside the weights. --push uploads the folder, if the data's card permits it.
"""

import argparse
from pathlib import Path

from grpo.runtime.command import run_main

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
    parser.add_argument(
        "--licence", help="of the model, as the hub names it (apache-2.0, cc-by-4.0, ...), for its card"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub; the key is HF_TOKEN, from .env")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see; default: private")
    arguments = parser.parse_args()
    from grpo.data.card import publishable
    from grpo.tools.export import export
    from grpo.tracking.model_card import model_card, publish

    if arguments.push:
        publishable(arguments.run)  # refused before anything is written
    folder = export(arguments.run, arguments.format, arguments.output, arguments.step)
    about = {"licence": arguments.licence, "step": arguments.step}
    model_card(arguments.run, **about).save(folder / "README.md")
    print(f"{folder}\nUse it: {NEXT[arguments.format].format(folder=folder)}")
    if arguments.push:
        address = publish(arguments.run, folder, arguments.push, private=not arguments.public, **about)
        print(f"Pushed: {address}")


if __name__ == "__main__":
    run_main(main)
