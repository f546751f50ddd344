"""Compare this trainer with TRL's GRPOTrainer on the same model, completions and rewards.

    python benchmarks/parity.py [--output docs/results/parity.json] [--only dapo] [--random 300]

Each case takes two or more optimizer steps (SGD) on the same completions, so those after the first one are off-policy:
their ratios leave the clip range. Compared in float32, for each step: the loss, the gradient norm and every parameter's
gradient. A difference is relative: |ours - theirs| / |theirs|, for gradients divided by the norm of all gradients.
Where the two differ on purpose, the table shows the factor: masked completions do not count in our denominators.
In random cases, which take up to 12 optimizer steps, each step here starts from TRL's weights: large steps multiply
rounding errors, and the difference of one step would be that of all before it.

The random cases draw a value of each setting, with a fixed seed: losses and their parameters, temperature, correction
of another sampler's logprobs, rewards that do not apply (None) or have weight 0, a reference of its own, tied weights,
one to three passes, one to four optimizer steps in each (mini-batches). Needs: pip install -e ".[benchmark]"
"""

import contextlib
import gc
import itertools
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from shared import character_tokenizer, script_parser, write_json
from torch import Tensor

from grpo.errors import ConfigError
from grpo.losses import MAX_LOG_RATIO
from grpo.runtime.command import run_main
from grpo.runtime.sums import Sums
from grpo.types import Completion, Group, Prompt

P, G, LENGTH, VOCABULARY = 3, 4, 9, 24
LEARNING_RATE = 6.0  # SGD: large enough for the second step's ratios to leave [0.8, 1.2]; less where more steps follow


SMALLEST_NORM = 1e-3
"""A gradient norm below this counts as this: where a correction masks nearly all tokens or a loss is saturated, only
the rounding errors of terms of size 1 are left."""


@dataclass(frozen=True)
class Case:
    """One setting of both trainers."""

    loss_type: str
    ours: dict[str, Any] = field(default_factory=dict)
    """Keys of our objective."""
    theirs: dict[str, Any] = field(default_factory=dict)
    """The same in TRL's GRPOConfig, where key or value differ."""
    steps: int = 2
    """Passes over the completions."""
    optimizer: str = "sgd"
    factor: float = 1.0
    """TRL's gradient divided by ours: not 1 where the two differ on purpose."""
    micro_batches: int = 1
    mini_batches: int = 1
    """Optimizer steps of a pass, each on its part of the completions: TRL's steps_per_generation."""
    shape: tuple[int, int] = (P, G)
    """Prompts, completions of each."""
    trl_defaults: bool = False
    """Keep TRL's defaults where they differ from ours, instead of setting ours in TRL."""
    flat: float | None = None
    """Reward of every completion of the first prompt, instead of fixed_rewards."""
    contrast: float = 0.0
    """Difference of the flat rewards of one prompt and the next."""
    seed: int | None = None
    """Draw completions, their sampling logprobs and rewards with this seed, instead of the fixed ones."""
    learning_rate: float = LEARNING_RATE
    temperature: float = 1.0
    correction: str = "none"
    """Of the sampling logprobs: rollout.correction."""
    cap: float = 2.0
    reference: bool = False
    """The reference is another model, not a copy of the policy."""
    tied: bool = False
    """The head is the embedding."""
    experts: bool = False
    """The model is a mixture of experts."""
    weights: tuple[float, float] = (1.0, 0.5)
    """Of the two rewards."""
    unknown: float = 0.0
    """Share of rewards that do not apply."""

    def groups(self) -> list[Group]:
        """Return the completions."""
        return fixed_groups(*self.shape) if self.seed is None else fixed_groups(*self.shape, seed=self.seed)

    def rewards(self) -> dict[str, list[Any]]:
        """Return the values of both rewards, one per completion. None: the reward does not apply."""
        if self.seed is not None:
            return drawn_rewards(self)
        if self.flat is None:
            return fixed_rewards()
        prompts, generations = self.shape
        earned = [self.flat + self.contrast * p for p in range(prompts) for _ in range(generations)]
        return {"first": earned, "second": [0.0] * len(earned)}

    @property
    def setting(self) -> str:
        """Describe the case in the table."""
        named = {name: value for name, value in vars(self).items() if name in DRAWN and value != DRAWN[name]}
        return ", ".join(f"{key} {value}" for key, value in (self.ours | named).items()) or "defaults"


DRAWN = {
    "steps": 2,
    "mini_batches": 1,
    "temperature": 1.0,
    "correction": "none",
    "reference": False,
    "tied": False,
    "experts": False,
    "weights": (1.0, 0.5),
    "unknown": 0.0,
}
"""Settings outside the objective that random cases draw, with their values in the other cases."""


@dataclass
class Outcome:
    """One trainer's losses and gradients of each optimizer step, and its weights at the end."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    starts: list[dict[str, Tensor]] = field(default_factory=list)
    """TRL: the weights before each step."""
    log_ratios: list[float] = field(default_factory=list)
    """Ours: the largest log-ratio to the old policy or of the reference in each step."""
    clipped: float = 0.0
    flat_groups: float = 0.0
    """TRL: its metric for the fraction of groups whose rewards are all equal."""


def cases() -> list[Case]:
    """Return the cases: every loss that both have, with and without KL, every scaling, masks, clips and levels."""
    made = []
    both = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
    for loss, beta, scale in itertools.product(both, (0.0, 0.3), ("group", "batch", "none")):
        made.append(Case(loss, {"beta": beta, "scale_rewards": scale}))
    for loss in both:
        made.append(Case(loss, {"beta": 0.0, "mask_truncated_completions": True}, factor=masked_factor(loss)))
        made.append(Case(loss, {"beta": 0.3, "mask_truncated_completions": True}, factor=masked_factor(loss)))
    for loss in ("grpo", "dapo", "dr_grpo", "bnpo"):
        for extra in (
            {"importance_sampling_level": "sequence"},
            {"epsilon": 0.1, "epsilon_high": 0.28},
            {"delta": 1.5},
            {"use_bias_correction_kl": False},
            {"entropy_coef": 0.05},
            {"multi_objective_aggregation": "normalize_then_sum"},
        ):
            made.append(Case(loss, {"beta": 0.3, **extra}))
    for loss in ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"):  # bnpo: TRL divides by micro-batches
        for beta, count in itertools.product((0.0, 0.3), (2, 3)):
            made.append(Case(loss, {"beta": beta}, mini_batches=count, learning_rate=0.5))
    made.append(Case("dapo", {"beta": 0.3}, mini_batches=3, micro_batches=2, learning_rate=0.5))
    for target in (0.5, 5.0):
        adaptive = {"use_adaptive_entropy": True, "entropy_coef_delta": 0.05, "entropy_target": target}
        made.append(Case("dapo", {"beta": 0.3, "entropy_coef": 0.1, **adaptive}, steps=3, learning_rate=0.5))
    for share in (0.2, 0.5):
        made.append(Case("grpo", {"beta": 0.3, "top_entropy_quantile": share}))
        made.append(Case("dapo", {"beta": 0.0, "top_entropy_quantile": share}, mini_batches=2))
    for mode, loss in itertools.product(("sequence_truncate", "sequence_mask"), ("grpo", "dapo", "cispo", "vespo")):
        made.append(Case(loss, {"beta": 0.3}, seed=3, learning_rate=2.0, correction=mode, cap=5.0))
    for threshold in (0.5, 2.0):
        ours = {"beta": 0.3, "off_policy_mask_threshold": threshold}
        made.append(Case("dapo", ours, seed=4, learning_rate=2.0, correction="truncate"))
    for beta in (0.0, 0.3):
        ours = {"beta": beta, "epsilon": 0.4, "use_bias_correction_kl": False}
        made.append(Case("gmpo", ours))
        ours = ours | {"epsilon": 0.2, "epsilon_high": 0.3}
        made.append(Case("gmpo", ours, mini_batches=2, learning_rate=0.5))
    made.append(Case("gspo", {"beta": 0.0}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}))
    made.append(Case("luspo", {"beta": 0.3, "importance_sampling_level": "token"}))
    return made


def expert_cases() -> list[Case]:
    """Return cases of a mixture of experts with its load-balancing loss. TRL has one micro-batch, ours has several."""
    small = {"experts": True, "learning_rate": 0.5}
    return [
        Case("dapo", {"beta": 0.0, "router_aux_loss_coef": 0.5}, **small),
        Case("grpo", {"beta": 0.3, "router_aux_loss_coef": 0.1}, **small),
        Case("dapo", {"beta": 0.0}, **small),  # both take the coefficient from the model's config
        Case("dapo", {"beta": 0.0, "router_aux_loss_coef": 0.0}, **small),
    ]


def masked_factor(loss_type: str, groups: list[Group] | None = None) -> float:
    """Return TRL's gradient over ours with masked completions, which TRL's per-completion means count."""
    from grpo.losses import LOSSES

    if LOSSES.get(loss_type).per == "token":
        return 1
    ended = [completion.ended for group in groups or fixed_groups() for completion in group.completions]
    return sum(ended) / len(ended)


def random_cases(count: int) -> list[Case]:
    """Return `count` cases whose settings are drawn, always the same ones."""
    return [random_case(random.Random(number), number) for number in range(count)]


def random_case(chance: random.Random, seed: int) -> Case:
    """Draw one case. What TRL refuses, or defines differently on purpose, is not drawn."""
    loss = chance.choice(["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
    beta = chance.choice([0.0, 0.04, 0.3, 1.0])
    ours: dict[str, Any] = {"beta": beta, "scale_rewards": chance.choice(["group", "batch", "none"])}
    if beta:
        ours["use_bias_correction_kl"] = chance.random() < 0.7
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        ours["epsilon"] = chance.choice([0.1, 0.2, 0.4])
        if chance.random() < 0.5:
            ours["epsilon_high"] = chance.choice([0.28, 0.5])
        if chance.random() < 0.3:
            ours["delta"] = chance.choice([1.6, 3.0])
    if loss == "cispo":
        ours["epsilon_high"] = chance.choice([1.0, 2.0, 5.0])
    if loss not in ("luspo", "vespo") and chance.random() < 0.25:
        ours["importance_sampling_level"] = "sequence"
    if loss == "sapo":
        ours |= {f"sapo_temperature_{side}": round(chance.uniform(0.3, 3.0), 2) for side in ("pos", "neg")}
    if loss == "vespo":
        ours |= {f"vespo_k_{side}": round(chance.uniform(0.5, 4.0), 2) for side in ("pos", "neg")}
        ours |= {f"vespo_lambda_{side}": round(chance.uniform(0.5, 4.0), 2) for side in ("pos", "neg")}
    weights = chance.choice([(1.0, 0.5), (1.0, 0.0), (0.7, 1.3), (1.0, -0.5)])
    masked = chance.random() < 0.3
    if masked:
        ours["mask_truncated_completions"] = True
    elif chance.random() < 0.2:  # a masked completion dilutes TRL's loss, but not its entropy
        ours["entropy_coef"] = chance.choice([0.01, 0.1])
    if ours["scale_rewards"] == "group" and weights[1] and chance.random() < 0.2:
        ours["multi_objective_aggregation"] = "normalize_then_sum"
    case = Case(
        loss,
        ours,
        steps=chance.choice([1, 2, 2, 3]),
        shape=(chance.choice([2, 3]), chance.choice([3, 4, 6])),
        seed=seed,
        learning_rate=chance.choice([0.5, 2.0]),
        temperature=chance.choice([1.0, 1.0, 0.6, 1.5]),
        correction=chance.choice(["none", "truncate", "mask"]),
        cap=chance.choice([1.5, 2.0, 5.0]),
        reference=beta > 0 and chance.random() < 0.4,
        tied=chance.random() < 0.3,
        weights=weights,
        unknown=chance.choice([0.0, 0.0, 0.2]) if weights[1] else 0.0,
    )
    if loss != "bnpo" and "entropy_coef" not in ours and not masked:  # where TRL divides by the same
        count = chance.choice([1, 1, *equal_parts(case.shape)])
        case = replace(case, mini_batches=count, learning_rate=case.learning_rate / count)  # more steps, as far apart
    if case.correction != "none" and chance.random() < 0.4:
        case = replace(case, correction=f"sequence_{case.correction}")
    if case.correction != "none" and chance.random() < 0.3:
        ours["off_policy_mask_threshold"] = chance.choice([0.5, 2.0])
    if not masked and "entropy_coef" not in ours and chance.random() < 0.2:
        ours["top_entropy_quantile"] = chance.choice([0.2, 0.5, 0.8])
    return replace(case, factor=masked_factor(loss, case.groups())) if masked else case


def equal_parts(shape: tuple[int, int]) -> list[int]:
    """Return the numbers of mini-batches, 2 to 4, that cut the completions into equal parts."""
    return [count for count in (2, 3, 4) if math.prod(shape) % count == 0]


def main() -> None:
    """Run the cases and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--only", help="only cases of this loss_type")
    parser.add_argument("--random", type=int, default=300, help="number of random cases")
    options = parser.parse_args()

    def run(chosen: list[Case], forced: bool = False) -> list[dict[str, Any]]:
        found = []
        for case in chosen:
            if options.only in (None, case.loss_type):
                found.append(compare(case, forced=forced))
                print(line(found[-1]), flush=True)
                gc.freeze()  # TRL collects garbage after each run, among all objects of the libraries
        return found

    rows, drawn, experts = run(cases()), run(random_cases(options.random), True), run(expert_cases())
    whole = compare(Case("dapo", {"beta": 0.3}, steps=5, optimizer="adamw")) if not options.only else None
    worst, worst_drawn = largest(rows), largest(drawn)
    print(f"{len(rows)} cases, largest relative difference {worst:.1e}")
    print(f"{len(drawn)} random cases, largest relative difference {worst_drawn:.1e}")
    print(f"{len(experts)} cases with experts, largest relative difference {largest(experts):.1e}")
    if whole:
        print(
            f"5 AdamW steps on fixed completions: weights apart by {whole['moved']:.1e} of what they moved, "
            f"none by more than {whole['weights']:.1e}"
        )
    if options.output:
        report = {
            "command": "python benchmarks/parity.py --output docs/results/parity.json",
            "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
            "cases": rows,
            "random": drawn,
            "experts": experts,
            "five_steps": whole,
            "largest": worst,
            "largest_random": worst_drawn,
        }
        write_json(options.output, report)


def largest(rows: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of the rows."""
    return max((max(row["loss"], row["gradient_norm"], row["gradient"]) for row in rows), default=0.0)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    factor = "" if row["factor"] == 1 else f"  (ours x {row['factor']:.3f}: on purpose)"
    return (
        f"{row['loss_type']:8} {row['setting']:60} loss {row['loss']:.1e}  norm {row['gradient_norm']:.1e}  "
        f"gradients {row['gradient']:.1e}  clipped {row['clipped']:.2f}{factor}"
    )


def compare(case: Case, *, forced: bool = False) -> dict[str, Any]:
    """Run one case. Return its row of the table: the largest relative differences over its optimizer steps.

    `capped` is the number of steps that are not compared: they have a log-ratio above 20, where ratios here are capped
    and TRL's are not (docs/theory.md).

    Args:
        forced: Each of our optimizer steps starts from TRL's weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), tied=case.tied, experts=case.experts)
        if case.reference:
            make_model(Path(folder) / "reference", seed=1, tied=case.tied)
        theirs = run_trl(case, Path(folder))
        ours = run_ours(case, Path(folder), theirs.starts if forced else None)
    row = {"loss_type": case.loss_type, "setting": case.setting, "steps": case.steps, "factor": case.factor}
    row |= {"loss": 0.0, "gradient_norm": 0.0, "gradient": 0.0, "clipped": ours.clipped}
    steps = zip(ours.losses, theirs.losses, ours.gradients, theirs.gradients, ours.log_ratios, strict=True)
    row["capped"] = sum(ratio > MAX_LOG_RATIO for ratio in ours.log_ratios)
    for mine, other, mine_g, other_g, ratio in steps:
        if ratio > MAX_LOG_RATIO:
            continue
        norm = max(total_norm(other_g), SMALLEST_NORM)
        # A loss is a mean of terms of size 1 and both signs that cancel (advantages sum to 0). Float32 rounds
        # the terms, so a difference is compared with their size. tests/benchmarks/test_parity.py shows it
        # against float64.
        row["loss"] = max(row["loss"], abs(mine * case.factor - other) / max(abs(other), 1.0))
        norms = total_norm(mine_g) * case.factor, total_norm(other_g)
        row["gradient_norm"] = max(row["gradient_norm"], abs(norms[0] - norms[1]) / norm)
        apart = total_norm({name: mine_g[name] * case.factor - other_g[name] for name in other_g})
        row["gradient"] = max(row["gradient"], apart / norm)
    row["weights"] = max(float((ours.weights[name] - theirs.weights[name]).abs().max()) for name in theirs.weights)
    apart = total_norm({name: ours.weights[name] - theirs.weights[name] for name in theirs.weights})
    moved = total_norm({name: theirs.weights[name] - theirs.starts[0][name] for name in theirs.weights})
    row["moved"] = apart / max(moved, 1e-6)  # 0 where the correction masks all tokens
    return row


def total_norm(gradients: dict[str, Tensor]) -> float:
    """Return the norm over all tensors, in float64."""
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))


def make_model(folder: Path, seed: int = 0, tied: bool = False, experts: bool = False) -> None:
    """Save a tiny Qwen2 or Qwen3-MoE, far from uniform, with a tokenizer of single letters."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

    character_tokenizer("".join(chr(ord("a") + i) for i in range(VOCABULARY - 2))).save_pretrained(folder)
    torch.manual_seed(seed)
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.02}
    shape = (Qwen3MoeConfig if experts else Qwen2Config)(
        **(mixture if experts else {}),
        tie_word_embeddings=tied,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)


def other_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the reference that is no copy of the policy."""
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32).state_dict()


def fixed_groups(prompts: int = P, generations: int = G, seed: int | None = None) -> list[Group]:
    """Return groups of completions of uneven lengths; some are cut off at LENGTH, and the first one is not.

    With a seed, the sampling logprobs are drawn too: those of another policy.
    """
    generator = torch.Generator().manual_seed(1 if seed is None else 1000 + seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    groups = []
    for p in range(prompts):
        prompt = draw(2, VOCABULARY, 3 + 2 * p)
        completions = []
        for _ in range(generations):
            [length] = draw(1, LENGTH + 3, 1)
            if seed is not None and not (groups or completions):
                length = min(length, LENGTH)
            ended = length <= LENGTH
            ids = draw(2, VOCABULARY, length - 1) + [0] if ended else draw(2, VOCABULARY, LENGTH)
            sampling = (
                torch.rand(len(ids), generator=generator) * -6 if seed is not None else torch.full((len(ids),), -1.0)
            )
            completions.append(Completion(ids, sampling.tolist(), ended, ""))
        groups.append(Group(Prompt(p, "".join(chr(ord("a") + i - 2) for i in prompt), tuple(prompt)), completions))
    return groups


def fixed_rewards() -> dict[str, list[float]]:
    """Return random values of two rewards, always the same."""
    generator = torch.Generator().manual_seed(2)
    return {
        "first": torch.randint(0, 3, (P * G,), generator=generator).tolist(),
        "second": torch.rand(P * G, generator=generator).tolist(),
    }


def drawn_rewards(case: Case) -> dict[str, list[Any]]:
    """Return random values of both rewards. Some do not apply, but two completions of each group have the first one."""
    prompts, generations = case.shape
    chance = random.Random(10_000 + int(case.seed or 0))
    found: dict[str, list[Any]] = {"first": [], "second": []}
    for _ in range(prompts):
        for sample in range(generations):
            for name, values in found.items():
                is_known = (name == "first" and sample < 2) or chance.random() >= case.unknown
                values.append(chance.uniform(-1, 2) if is_known else None)
    return found


def run_ours(case: Case, folder: Path, starts: list[dict[str, Tensor]] | None = None) -> Outcome:
    """Run a case through our compute_advantages and update: advantages, packing, objective, optimizer.

    Args:
        starts: Weights that each optimizer step starts from; None: those of the step before.
    """
    from types import SimpleNamespace

    from accelerate import Accelerator

    from grpo.config.schema import (
        Config,
        ModelConfig,
        ObjectiveConfig,
        OptimizerConfig,
        RolloutConfig,
        SamplingConfig,
    )
    from grpo.experience import ExperienceCollector, Sampled
    from grpo.losses import policy_loss
    from grpo.policy import Policy
    from grpo.rewards.scoring import RewardSum
    from grpo.runtime.timing import Clock
    from grpo.trainer import update

    prompts, generations = case.shape
    config = Config(
        prompts_per_step=prompts,
        tokens_per_batch=40 if case.micro_batches == 1 else 20,
        objective=ObjectiveConfig(
            loss_type=case.loss_type, num_iterations=case.steps, mini_batches=case.mini_batches, **case.ours
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=1e9),
        sampling=SamplingConfig(num_generations=generations, max_completion_length=LENGTH),
        rollout=RolloutConfig(correction=case.correction, correction_cap=case.cap),
        model=ModelConfig(name=str(folder)),
    )
    policy = Policy(
        Accelerator(cpu=True),
        str(folder),
        config.model,
        config.objective,
        config.optimizer,
        temperature=case.temperature,
        optimizer_steps=config.optimizer_steps,
    )
    if case.reference:
        policy.reference.model.load_state_dict(other_weights(folder))  # type: ignore[union-attr]
    if case.optimizer == "sgd":
        # Where our gradient is a multiple of TRL's, the learning rate makes the steps equal.
        policy.strategy.prepared_optimizer = torch.optim.SGD(
            policy.model.parameters(), lr=case.learning_rate * case.factor
        )
    outcome = Outcome([], [], {})
    step, backward = policy.step, policy.backward
    running, ratios = [0.0], [0.0]

    def watched_backward(loss: Tensor) -> None:
        running[0] += float(loss.detach())
        backward(loss)

    def watched_loss(
        logprobs: Tensor, old: Tensor, reference: Tensor | None, batch: Any, *given: Any, **more: Any
    ) -> Any:
        of_loss, now = batch.weights_N != 0, logprobs.detach()
        for log_ratio in (now - old, *(() if reference is None else (reference - now,))):
            ratios[0] = max(ratios[0], float(log_ratio[of_loss].max()) if bool(of_loss.any()) else 0.0)
        return policy_loss(logprobs, old, reference, batch, *given, **more)

    def watched_step(usable: bool = True) -> float:
        outcome.gradients.append({name: p.grad.clone() for name, p in policy.model.named_parameters()})
        outcome.losses.append(running[0])
        outcome.log_ratios.append(ratios[0])
        running[0] = ratios[0] = 0.0
        norm = step(usable)
        if starts is not None and len(outcome.losses) < len(starts):
            with torch.no_grad():
                for name, parameter in policy.model.named_parameters():
                    parameter.copy_(starts[len(outcome.losses)][name])
        return norm

    policy.backward, policy.step = watched_backward, watched_step  # type: ignore[method-assign]
    rewards: Any = SimpleNamespace(weights=dict(zip(("first", "second"), case.weights, strict=True)))
    scores = RewardSum.combine(rewards, case.rewards(), case.groups())
    run: Any = SimpleNamespace(
        config=config,
        accelerator=policy.accelerator,
        policy=policy,
        beta=config.objective.beta,
    )
    unused: Any = None
    collector = ExperienceCollector(config, policy.accelerator, policy, unused, unused, rewards)
    sums = Sums()
    sampled = Sampled(case.groups(), scores, list(range(prompts)))
    with mock.patch("grpo.trainer.policy_loss", watched_loss):
        update(run, collector.compute_advantages(sampled, run.beta, sums), sums, Clock())
    outcome.weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    outcome.clipped = sums.mean("clipped")
    return outcome


def run_trl(case: Case, folder: Path) -> Outcome:
    """Run a case through TRL's GRPOTrainer.train(), whose rollout_func returns the fixed completions."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError('parity is measured against TRL: pip install -e ".[benchmark]"') from error
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    outcome = Outcome([], [], {})

    class Watched(trl_class(case)):  # type: ignore[misc]
        running = 0.0

        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            self.running += float(loss.detach())
            return loss

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
            outcome.gradients.append(grads)
            outcome.losses.append(trainer.running)
            outcome.starts.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            trainer.running = 0.0

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [{"prompt": str(group.prompt.messages)} for group in case.groups()]
    sgd = torch.optim.SGD(model.parameters(), lr=case.learning_rate) if case.optimizer == "sgd" else None
    with tempfile.TemporaryDirectory() as temporary:
        trainer = Watched(
            model=model,
            args=trl_config(case, temporary),
            train_dataset=Dataset.from_list(prompts),
            reward_funcs=trl_rewards(case),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            callbacks=[Recorder()],
            rollout_func=trl_rollouts(case),
            optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)) if sgd else (None, None),
        )
        if case.reference:
            trainer.ref_model.load_state_dict(other_weights(folder))
        if case.correction != "none":  # part of TRL's vLLM path; the completions are given, so vLLM is never called
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
            mode = case.correction if "_" in case.correction else f"token_{case.correction}"
            trainer.vllm_importance_sampling_mode = mode
            trainer.vllm_importance_sampling_clip_max = case.cap
            trainer.vllm_importance_sampling_clip_min = 1 / case.cap if "mask" in case.correction else None
            trainer._last_loaded_step = 0
        trainer.remove_callback(PrinterCallback)
        with in_order() if case.mini_batches > 1 else contextlib.nullcontext():
            trainer.train()
    outcome.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    logged = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    outcome.flat_groups = logged[0]
    return outcome


def trl_class(case: Case) -> Any:
    """Return TRL's trainer of the loss."""
    import trl

    if case.loss_type != "gmpo":
        return trl.GRPOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    return GMPOTrainer


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Let TRL cut the completions in the order of the prompts, as ours are, instead of at random."""
    from trl.trainer import grpo_trainer

    shuffle = grpo_trainer.shuffle_sequence_dict
    grpo_trainer.shuffle_sequence_dict = lambda sequences: sequences
    try:
        yield
    finally:
        grpo_trainer.shuffle_sequence_dict = shuffle


def trl_rollouts(case: Case) -> Any:
    """Return TRL's rollout_func: prompts -> the fixed completions of each, in turn."""
    by_text = {str(group.prompt.messages): group for group in case.groups()}

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: dict[str, int] = {}
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "sample": []}
        for prompt in prompts:
            sample = seen[prompt] = seen.get(prompt, -1) + 1
            found["prompt_ids"].append(list(by_text[prompt].prompt.token_ids))
            found["completion_ids"].append(by_text[prompt].completions[sample].token_ids)
            found["logprobs"].append(by_text[prompt].completions[sample].logprobs)
            found["sample"].append(sample)
        return found if case.correction != "none" else found | {"logprobs": None}

    return rollouts


def trl_rewards(case: Case) -> list[Any]:
    """Return TRL's reward functions: the fixed rewards, looked up by prompt and sample."""
    generations, values = case.shape[1], case.rewards()
    rewards = {
        (str(group.prompt.messages), sample): {name: given[p * generations + sample] for name, given in values.items()}
        for p, group in enumerate(case.groups())
        for sample in range(generations)
    }

    def first(prompts: list[str], sample: list[int], **_: Any) -> list[float | None]:
        return [rewards[prompt, s]["first"] for prompt, s in zip(prompts, sample, strict=True)]

    def second(prompts: list[str], sample: list[int], **_: Any) -> list[float | None]:
        return [rewards[prompt, s]["second"] for prompt, s in zip(prompts, sample, strict=True)]

    return [first, second]


def trl_config(case: Case, folder: str) -> Any:
    """Return TRL's GRPOConfig with the settings of ours."""
    import trl

    settings: dict[str, Any] = {"loss_type": case.loss_type, **case.ours, **case.theirs}
    if settings["loss_type"] == "cispo" and not case.trl_defaults:
        settings.setdefault("epsilon_high", 5.0)  # our default
    if settings["loss_type"] == "luspo":
        settings.setdefault("importance_sampling_level", "sequence")
    config_class = trl.GRPOConfig
    if case.loss_type == "gmpo":
        from trl.experimental.gmpo import GMPOConfig as config_class

        del settings["loss_type"]
    return config_class(
        output_dir=folder,
        max_steps=case.steps * case.mini_batches,
        per_device_train_batch_size=math.prod(case.shape) // (case.micro_batches * case.mini_batches),
        gradient_accumulation_steps=case.micro_batches,
        steps_per_generation=case.micro_batches * case.mini_batches,
        num_generations=case.shape[1],
        num_iterations=case.steps,
        max_completion_length=LENGTH,
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        temperature=case.temperature,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,
        reward_weights=list(case.weights),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **settings,
    )


if __name__ == "__main__":
    run_main(main)
