"""Cost of a config: batch arithmetic, number of steps, and a lower bound on the time per step."""

import math
import time

import torch

from grpo.config.schema import Config


def steps_of(config: Config, prompts: int | None) -> int:
    """Return the number of training steps: num_train_epochs decides where it is set. `prompts` None: a stream."""
    if config.num_train_epochs is None or prompts is None:
        return config.steps
    return math.ceil(config.num_train_epochs * prompts / config.prompts_per_step)


def describe_batch(config: Config, prompts: int | None) -> str:
    """Return the batch arithmetic in words: "8 prompts x 16 completions = 128 completions per step; ...".

    Args:
        config: The config.
        prompts: Prompts of one epoch, or None for a stream of unknown length.
    """
    P, G = config.prompts_per_step, config.sampling.num_generations
    steps = steps_of(config, prompts)
    total = f"{steps} steps = {steps * P:,} prompts"
    if prompts is not None:
        total += f" = {steps * P / max(1, prompts):.2f} epochs of {prompts:,}"
    tokens = P * G * config.sampling.max_completion_length
    count = config.objective.num_iterations * config.objective.mini_batches
    updates = "1 optimizer step" if count == 1 else f"{count} optimizer steps"
    return (
        f"{P} prompts x {G} completions = {P * G} completions per step, at most {tokens:,} tokens; {updates} on them, "
        f"in batches of up to {config.tokens_per_batch:,} tokens; {total}; totals over all processes"
    )


def least_operations(config: Config, parameters: int, prompt_tokens: int) -> float:
    """Return a lower bound on the floating-point operations of a step, with completions of half the maximum length.

    Per weight and token: 2 to sample, 2 for the reference, 6 per training iteration (forward 2, backward 4), 2 for the
    old logprobs of all mini-batches but the first. Kaplan et al. 2020, section 2.1.

    Args:
        config: The config.
        parameters: The model's weights.
        prompt_tokens: Tokens of a typical prompt.
    """
    completions = config.prompts_per_step * config.sampling.num_generations
    tokens = completions * config.sampling.max_completion_length / 2
    objective = config.objective
    passes = 2 + (2 if objective.beta > 0 else 0) + 6 * objective.num_iterations + 2 * (1 - 1 / objective.mini_batches)
    return passes * parameters * (tokens + config.prompts_per_step * prompt_tokens)


def measure_matrix_rate() -> float:
    """Return the floating-point operations per second of a float32 matrix product on this machine, the best of five."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    size = 512
    a = torch.rand(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
