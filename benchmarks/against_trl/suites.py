"""The sizes of work, and the model and prompts that both trainers get."""

import argparse
import json
import math
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.errors import ConfigError

REWARDS = ["xmlcount", "soft_format", "strict_format", "int", "correctness"]
PHASES = ["step", "rollout", "reward", "reference", "update"]


@dataclass(frozen=True)
class Suite:
    """One size of work."""

    prompts_per_step: int
    num_generations: int
    max_completion_length: int
    mean_length: int
    steps: int
    """Measured steps of each run. One step before them is not measured."""
    rounds: int
    tokens_per_batch: int
    """tokens_per_batch of our trainer, about one group."""
    hidden_size: int
    layers: int
    vocabulary: int
    intermediate_size: int = 0
    """0 = a tiny model (a small Qwen2 with a few supervised steps); otherwise random weights of this shape."""
    heads: int = 0
    key_value_heads: int = 0
    gsm8k: bool = True
    """Prompts from a GSM8K file (--data.path), else generated arithmetic."""
    device: str = "cpu"
    precision: str = "no"
    trl_micro_batch: int = 8
    """Micro-batch of TRL tuned. TRL's default is 8."""
    family: str = "qwen2"
    """Architecture of the random model: qwen2 or llama."""
    warm_up_steps: int = 10


SUITES = {
    "cpu-tiny": Suite(4, 8, 64, 32, 4, 2, 512, hidden_size=128, layers=4, vocabulary=600, gsm8k=False),
    "cpu-gsm8k": Suite(4, 8, 128, 86, 3, 2, 512, hidden_size=256, layers=6, vocabulary=8192),
    "cpu-gsm8k-long": Suite(4, 16, 200, 86, 2, 2, 512, hidden_size=256, layers=6, vocabulary=8192),
    # The shape of SmolLM2-135M.
    "cpu-135m": Suite(4, 8, 128, 86, 2, 2, 2048, 576, 30, 49152, 1536, 9, 3, family="llama"),
    # The shapes of Qwen2.5-0.5B and Qwen2.5-1.5B.
    "gpu-0.5b": Suite(
        8, 16, 786, 250, 3, 2, 16384, 896, 24, 151936, 4864, 14, 2, device="cuda", precision="bf16", trl_micro_batch=16
    ),
    "gpu-1.5b": Suite(
        8, 16, 786, 250, 3, 2, 16384, 1536, 28, 151936, 8960, 12, 2, device="cuda", precision="bf16", trl_micro_batch=16
    ),
}
RUNNERS = ["ours", "trl_default", "trl_tuned"]


def chosen_suite(flags: argparse.Namespace) -> Suite:
    """Return the suite with the changes of the flags.

    Raises:
        ConfigError: for a GPU suite without a GPU.
    """
    import torch

    suite = SUITES[flags.suite]
    if flags.dry_run:
        shape = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4} if suite.heads else {}
        shape |= {"vocabulary": 9000} if suite.heads else {}
        suite = replace(suite, device="cpu", max_completion_length=24, mean_length=10, prompts_per_step=2, **shape)
        suite = replace(suite, steps=1, rounds=1, tokens_per_batch=1024, num_generations=4, trl_micro_batch=4)
    elif suite.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"suite {flags.suite} needs a CUDA device, and torch {torch.__version__} sees none here: run it where "
            "there is one, or add --dry_run to walk the same path with a narrow model on the CPU"
        )
    return replace(
        suite,
        steps=flags.steps or suite.steps,
        rounds=flags.rounds or suite.rounds,
        precision=flags.precision or suite.precision,
    )


def forced_lengths(suite: Suite, step: int) -> list[int]:
    """Return the length of each completion of a step.

    They are quantiles of a log-normal distribution, scaled to the suite's mean and cut at the limit. The longest has
    the limit. Their order depends on the step.
    """
    count, limit = suite.prompts_per_step * suite.num_generations, suite.max_completion_length
    normal = statistics.NormalDist()
    shape = [math.exp(0.7 * normal.inv_cdf((index + 0.5) / count)) for index in range(count - 1)]

    def scaled(factor: float) -> list[int]:
        return [max(1, min(limit, round(factor * value))) for value in shape] + [limit]

    low, high = 0.0, float(limit) * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if statistics.fmean(scaled(middle)) < suite.mean_length else (low, middle)
    lengths = scaled(low)
    random.Random(f"lengths {step}").shuffle(lengths)
    return lengths


def make_work(suite: Suite, folder: Path, data_path: str | None) -> None:
    """Write the model and the prompts for both trainers into `folder`: model/ and rows.jsonl."""
    from grpo.data.arithmetic import generate_problems
    from grpo.models.tiny import GSM8K_RECIPE, Recipe, make_tiny_model

    if suite.gsm8k and not data_path:
        raise ConfigError("this suite needs GSM8K rows: add --data.path train.jsonl")
    rows: list[dict] = (
        [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if suite.gsm8k and data_path
        else list(generate_problems(2000, seed=0, split="train"))
    )
    needed = suite.prompts_per_step * (suite.steps + 1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: max(needed, 64)]))
    if suite.intermediate_size:
        make_random_model(suite, folder / "model", [text for row in rows for text in (row["question"], row["answer"])])
        return
    recipe = replace(
        GSM8K_RECIPE if suite.gsm8k else Recipe(),
        hidden_size=suite.hidden_size,
        layers=suite.layers,
        heads=suite.hidden_size // 32,
        key_value_heads=suite.hidden_size // 128,
        vocabulary=suite.vocabulary,
        steps=suite.warm_up_steps,
        batch=16,
    )
    model = make_tiny_model(seed=0, problems=rows, recipe=recipe)
    (folder / "model").symlink_to(model)


def make_random_model(suite: Suite, folder: Path, texts: list[str]) -> None:
    """Save random weights in the shape of a real model, and a tokenizer made from the texts, without any download."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

    from grpo.models.tiny import make_tokenizer

    tokenizer = make_tokenizer(texts, 8192)
    torch.manual_seed(0)
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[suite.family]
    config = kind(
        vocab_size=suite.vocabulary,
        hidden_size=suite.hidden_size,
        intermediate_size=suite.intermediate_size,
        num_hidden_layers=suite.layers,
        num_attention_heads=suite.heads,
        num_key_value_heads=suite.key_value_heads,
        max_position_embeddings=4096,
        rope_theta=1e6 if suite.family == "qwen2" else 1e5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
