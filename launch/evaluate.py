"""Evaluate a saved model on held-out questions, and its base model on the same ones.

python launch/evaluate.py --model DIR --data.path FILE [--base DIR] [--samples 8] [--output FILE.json] [--items FILE.jsonl]
                          [--config FILE] [--key.subkey VALUE ...]

Greedy accuracy, strict (the reward's) and flexible (the last number, whatever the format), with 95 % intervals; with
--samples K also avg@K and the unbiased pass@k of K sampled completions; with --base the paired change of the greedy answers
and McNemar's exact test. The config of the run that DIR belongs to is read first, so prompts are those of training.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.runtime.command import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a model folder (a run's final/) or a hub id")
    parser.add_argument("--base", help='a second model on the same items; "run" = what the run of --model started from')
    parser.add_argument(
        "--samples", type=int, default=1, help="beside the greedy answer, K > 1 sampled ones: avg@K, pass@k"
    )
    parser.add_argument("--output", help="write the metrics (and every completion) to this JSON file")
    parser.add_argument("--items", help="write a line per completion to this JSONL file")
    ours, rest = parser.parse_known_args(sys.argv[1:])
    if ours.samples < 1:
        raise ConfigError(f"--samples is {ours.samples}, needs at least 1")
    config = config_of(ours.model, rest)
    base = base_of(ours.model) if ours.base == "run" else ours.base
    config.data.eval_path = config.data.eval_path or config.data.path

    from grpo.models.strategies.registry import start_accelerator
    from grpo.rollout.evaluation import compare

    accelerator = start_accelerator()
    report: dict[str, Any] = {"model": ours.model}
    rows: dict[str, list[dict]] = {}
    greedy: dict[str, list[dict]] = {}
    for role, path in {"base": base, "model": ours.model}.items():
        if path is not None:
            result, rows[role] = evaluate_one(config, path, ours.samples, accelerator)
            greedy[role] = [row for row in rows[role] if row["decoding"] == "greedy"]
            report |= result if role == "model" else {"base": {"model": path, **result}}
    if base is not None and report["interval95"]:
        report["change"] = {name: compare(greedy["base"], greedy["model"], name) for name in ("accuracy", "flexible")}
    if accelerator.is_main_process:
        print(json.dumps(report, indent=2))
        if ours.output:
            everything = report | {"rows": rows["model"]} | ({"base_rows": rows["base"]} if base is not None else {})
            Path(ours.output).write_text(json.dumps(everything, indent=1, ensure_ascii=False), encoding="utf-8")
        if ours.items:
            lines = [json.dumps({"model": role, **row}, ensure_ascii=False) for role in rows for row in rows[role]]
            Path(ours.items).write_text("\n".join(lines) + "\n", encoding="utf-8")
    accelerator.end_training()


def evaluate_one(config: Config, path: str, samples: int, accelerator: Any) -> tuple[dict[str, Any], list[dict]]:
    """One model -> (its part of the report, a row per completion, the greedy ones first)."""
    from grpo.data.rows import load_examples
    from grpo.data.stream import render_prompts
    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.models.logprob_model import use_grpo_attention
    from grpo.rollout.engine import build_engine
    from grpo.rollout.evaluation import Evaluation, evaluate, intervals

    examples = load_examples(config.data, "held_out", config.seed)
    if not examples:
        raise ConfigError("nothing to evaluate on: give --data.path FILE (or --data.eval_path FILE)")
    tokenizer = load_tokenizer(path)
    prompts, dropped = render_prompts(examples, tokenizer, config.data.max_prompt_length)
    model = load_model(path)
    uses_packed_attention = use_grpo_attention(model)
    model.to(accelerator.device)
    engine = build_engine(
        config.rollout.engine,
        model,
        tokenizer,
        slots=config.rollout.slots,
        uses_packed_attention=uses_packed_attention,
        config=config.rollout,
        accelerator=accelerator,
        weights=model.named_parameters,
    )
    engine.update_weights(0)

    def answers(count: int, temperature: float) -> Evaluation:
        return evaluate(
            engine,
            prompts,
            accelerator,
            max_completion_length=config.sampling.max_completion_length,
            samples=count,
            temperature=temperature,
            seed=config.seed,
            prose=config.data.extractor == "quoted_terms",
        )

    greedy = answers(1, 0.0)
    rows = [{"decoding": "greedy", **row} for row in greedy.rows]
    found: dict[str, Any] = {"items": len(prompts), "samples": samples, "dropped": dropped, "metrics": greedy.metrics}
    found["interval95"] = intervals(greedy.rows)
    if samples > 1:
        sampled = answers(samples, config.sampling.temperature)
        rows += [{"decoding": "sampled", **row} for row in sampled.rows]
        avg = (
            {} if "eval/accuracy" not in sampled.metrics else {f"eval/avg@{samples}": sampled.metrics["eval/accuracy"]}
        )
        passed = {name: value for name, value in sampled.metrics.items() if name.startswith("eval/pass@")}
        found["metrics"] = greedy.metrics | avg | passed
        found["sampled"] = {
            "temperature": config.sampling.temperature,
            "metrics": sampled.metrics,
            "interval95": intervals(sampled.rows),
        }
    return found, rows


def config_of(model: str, flags: list[str]) -> Config:
    """The config of the run that the model folder lies in, if it lies in one, then the flags."""
    of_run = Path(model).parent / "config.yaml"
    files = [f"--config={of_run}"] if of_run.is_file() else []
    config = load_config([*files, *flags, f"--model.name={model}"])
    named = {flag.partition("=")[0] for flag in flags}
    if config.rollout.engine == "vllm" and "--rollout.engine" not in named:
        config.rollout.engine = "native"  # the server of the run need not be there any more
    if "--data.path" in named:  # it wins over the run's own held-out file, and over problems that no file holds
        if "--data.eval_path" not in named:
            config.data.eval_path = config.data.path
        if "--data.name" not in named and config.data.name == "arithmetic":
            config.data.name = "gsm8k"
    return config


def base_of(model: str) -> str:
    from grpo.tracking.run_reader import RunFolder

    base = RunFolder(Path(model).parent).base_model()
    if base is None:
        raise ConfigError(f"--base run: {Path(model).parent} does not say what it started from; give --base DIR")
    return base


if __name__ == "__main__":
    run_main(main)
