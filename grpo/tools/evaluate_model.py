"""Evaluate saved models: strict and flexible accuracy, avg@K and pass@k, and the change against a base model."""

import logging
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config
from grpo.data.rendering import render_prompts
from grpo.data.rows import Example, load_examples
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.models.logprob_model import use_grpo_attention
from grpo.rewards.scoring import RewardSum
from grpo.rollout.dialogue import build_turns, offer_tools
from grpo.rollout.engine import RolloutEngine, build_engine, end_token_ids
from grpo.rollout.evaluation import SCORES, Evaluation, compare, evaluate, intervals
from grpo.rollout.turn_rounds import with_turns
from grpo.types import Prompt

log = logging.getLogger(__name__)


def compare_models(
    config: Config, model: str, base: str | None, samples: int, accelerator: Any
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """Evaluate a model and its base.

    Returns:
        The report, and the rows per completion of "model" and, where there is one, "base".
    """
    report: dict[str, Any] = {"model": model}
    rows: dict[str, list[dict]] = {}
    greedy: dict[str, list[dict]] = {}
    for role, path in {"base": base, "model": model}.items():
        if path is not None:
            result, rows[role] = evaluate_model(config, path, samples, accelerator)
            greedy[role] = [row for row in rows[role] if row["decoding"] == "greedy"]
            report |= result if role == "model" else {"base": {"model": path, **result}}
    if base is not None and report["interval95"]:
        report["change"] = {name: compare(greedy["base"], greedy["model"], name) for name in ("accuracy", "flexible")}
    return report, rows


def evaluate_model(config: Config, path: str, samples: int, accelerator: Any) -> tuple[dict[str, Any], list[dict]]:
    """Evaluate one model.

    Returns:
        Its part of the report, and one row per completion, greedy ones first.
    """
    offer_tools(config)
    examples = load_examples(config.data, "held_out", config.seed)
    if not examples:
        raise ConfigError("nothing to evaluate on: give --data.path FILE (or --data.eval_path FILE)")
    evaluator = Evaluator.load(config, path, examples, accelerator)
    greedy = evaluator.evaluate(1, 0.0)
    rows = [{"decoding": "greedy", **row} for row in greedy.rows]
    judged = sum(row["accuracy"] is not None for row in rows)
    found: dict[str, Any] = {"items": len(evaluator.prompts), "judged": judged, "samples": samples}
    found["dropped"] = evaluator.dropped
    found |= {"metrics": greedy.metrics, "interval95": intervals(greedy.rows)}
    if samples > 1:
        temperature = config.sampling.temperature
        sampled = evaluator.evaluate(samples, temperature)
        rows += [{"decoding": "sampled", **row} for row in sampled.rows]
        metrics = sampled.metrics
        avg = {f"eval/avg@{samples}": metrics["eval/accuracy"]} if "eval/accuracy" in metrics else {}
        passed = {name: value for name, value in metrics.items() if name.startswith("eval/pass@")}
        found["metrics"] = greedy.metrics | avg | passed
        found["sampled"] = {"temperature": temperature, "metrics": metrics, "interval95": intervals(sampled.rows)}
    if evaluator.engine.turns is not None:
        evaluator.engine.turns.close()
    return found, rows


@dataclass(frozen=True)
class Evaluator:
    """One loaded model with the prompts to evaluate it on."""

    config: Config
    engine: RolloutEngine
    prompts: list[Prompt]
    dropped: int
    """Questions left out because their prompts are longer than data.max_prompt_length."""
    accelerator: Any

    @classmethod
    def load(cls, config: Config, path: str, examples: list[Example], accelerator: Any) -> "Evaluator":
        """Load the model at `path` and render the prompts with its chat template."""
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
        engine = with_turns(engine, build_turns(config, tokenizer, end_token_ids(model, tokenizer)))
        return cls(config, engine, prompts, dropped, accelerator)

    def evaluate(self, samples: int, temperature: float) -> Evaluation:
        """Complete each prompt `samples` times (temperature 0: greedily) and score the completions."""
        return evaluate(
            self.engine,
            self.prompts,
            self.accelerator,
            max_completion_length=self.config.sampling.max_completion_length,
            samples=samples,
            temperature=temperature,
            seed=self.config.seed,
            prose=self.config.data.extractor == "quoted_terms",
            rewards=own_rewards(self.config),
        )


def own_rewards(config: Config) -> RewardSum | None:
    """Return the rewards of the run; None if every evaluation has them, or if one cannot be loaded any more."""
    if config.rewards.keys() <= SCORES.keys():
        return None
    try:
        return RewardSum(config.rewards, config.reward_kwargs)
    except ConfigError as error:
        log.warning("evaluated without the rewards of the run: %s", error)
        return None
