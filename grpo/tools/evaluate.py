"""Evaluate a saved model on held-out questions, and optionally its base model on the same ones.

    grpo evaluate --model DIR --data.path FILE [--base DIR] [--samples 8] [--output FILE.json] [--items FILE.jsonl]
                  [--json] [--config FILE] [--key.subkey VALUE ...]

Reported with 95 % intervals: greedy accuracy, strict (as the reward judges it) and flexible (the last number in any
format). With --samples K also avg@K and the unbiased pass@k of K sampled completions. With --base the paired change of
the greedy answers and McNemar's exact test. The config of the run that DIR belongs to is read first, so the prompts and
the rewards are those of training. `grpo train --help` lists the config keys.
"""

import json
from pathlib import Path

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.data.card import GENERATED
from grpo.errors import ConfigError
from grpo.rollout.engine import find_engine
from grpo.tools.arguments import command_parser
from grpo.tools.saved_model import BASE_HELP, check_model, resolve_base, run_config_file


def main(argv: list[str]) -> None:
    """Run the command `grpo evaluate`."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--model", required=True, help="a model folder (a run's final/) or a hub id")
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument(
        "--samples", type=int, default=1, help="K > 1: K sampled completions as well, for avg@K, pass@k"
    )
    parser.add_argument("--output", help="write the metrics and every completion to this JSON file")
    parser.add_argument("--items", help="write one line per completion to this JSONL file")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of a table")
    options, flags = parser.parse_known_args(argv)
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}, needs at least 1")
    check_model(options.model)
    config = config_for(options.model, flags)
    base = resolve_base(options.model, options.base)

    from grpo.models.strategies.registry import start_accelerator
    from grpo.tools.evaluate_display import show
    from grpo.tools.evaluate_model import compare_models

    accelerator = start_accelerator()
    report, rows = compare_models(config, options.model, base, options.samples, accelerator)
    if accelerator.is_main_process:
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            show(report)
        if options.output:
            everything = report | {"rows": rows["model"]} | ({"base_rows": rows["base"]} if base is not None else {})
            Path(options.output).write_text(json.dumps(everything, indent=1, ensure_ascii=False), encoding="utf-8")
        if options.items:
            lines = [json.dumps({"model": role, **row}, ensure_ascii=False) for role in rows for row in rows[role]]
            Path(options.items).write_text("\n".join(lines) + "\n", encoding="utf-8")
    accelerator.end_training()


def config_for(model: str, flags: list[str]) -> Config:
    """Return the config of the run that `model` belongs to, if there is one, changed by `flags`.

    --data.path takes precedence over the run's own held-out file and over generated problems. A run whose
    engine had weights of its own is evaluated with the default engine, because its server need not exist any more.
    """
    run_config = run_config_file(model)
    files = [f"--config={run_config}"] if run_config else []
    config = load_config([*files, *flags, f"--model.name={model}"])
    given = {flag.partition("=")[0] for flag in flags}
    if "--rollout.engine" not in given and find_engine(config.rollout.engine).has_own_weights:
        config.rollout.engine = Config().rollout.engine
    if "--data.path" in given:
        if "--data.eval_path" not in given:
            config.data.eval_path = config.data.path
        if "--data.name" not in given and config.data.name in GENERATED:
            config.data.name = "question_answer"
    config.data.eval_path = config.data.eval_path or config.data.path
    return config
