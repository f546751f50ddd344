"""Evaluate a saved model folder on held-out questions: greedy accuracy with a 95 % interval, and pass@k when asked.

python launch/evaluate.py --model DIR --data.path FILE [--samples 8] [--output FILE.json] [--config FILE] [--key.subkey VALUE ...]
"""

import argparse
import json
import sys
from pathlib import Path

from grpo.config import load_config
from grpo.errors import ConfigError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a model folder (a run's final/) or a hub id")
    parser.add_argument("--samples", type=int, default=1, help="completions per question; more than 1 gives pass@k")
    parser.add_argument("--output", help="write metrics and every completion to this JSON file")
    ours, rest = parser.parse_known_args(sys.argv[1:])
    if ours.samples < 1:
        raise ConfigError(f"--samples is {ours.samples}, needs at least 1")
    config = load_config([*rest, f"--model.name={ours.model}"])
    config.data.eval_path = config.data.eval_path or config.data.path

    from grpo.data import load_examples
    from grpo.data.stream import render_prompts
    from grpo.distributed import start_accelerator
    from grpo.evaluation import evaluate
    from grpo.policy import load_model, load_tokenizer, use_grpo_attention
    from grpo.rollout import build_engine

    examples = load_examples(config.data, "held_out", config.seed)
    if not examples:
        raise ConfigError("nothing to evaluate on: give --data.path FILE (or --data.eval_path FILE)")
    tokenizer = load_tokenizer(ours.model)
    prompts, dropped = render_prompts(examples, tokenizer, config.data.max_prompt_length)
    accelerator = start_accelerator()
    model = load_model(ours.model)
    swapped = use_grpo_attention(model)
    model.to(accelerator.device)
    engine = build_engine(config.rollout.engine, model, tokenizer, slots=config.rollout.slots, swapped=swapped)
    result = evaluate(
        engine,
        prompts,
        accelerator,
        max_completion_length=config.sampling.max_completion_length,
        samples=ours.samples,
        temperature=0.0 if ours.samples == 1 else config.sampling.temperature,
        seed=config.seed,
        prose=config.data.extractor == "quoted_terms",
    )
    if accelerator.is_main_process:
        report = {"model": ours.model, "items": len(prompts), "dropped": dropped, "metrics": result.metrics}
        print(json.dumps(report, indent=2))
        if ours.output:
            Path(ours.output).write_text(json.dumps(report | {"rows": result.rows}, indent=1, ensure_ascii=False))
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
