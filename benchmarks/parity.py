"""Compare this trainer with TRL's GRPOTrainer on the same model, completions and rewards.

    python benchmarks/parity.py [--output docs/results/parity.json] [--only dapo]

Each case takes two optimizer steps (SGD) on the same completions, so the second one is off-policy: its ratios leave the
clip range. Compared in float32, for both steps: the loss, the gradient norm and every parameter's gradient. A
difference is relative: |ours - theirs| / |theirs|, for gradients divided by the norm of all gradients. Where the two
differ on purpose, the table shows the factor: masked completions do not count in our denominators. Needs: pip install
-e ".[benchmark]"
"""

import itertools
import math
import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from shared import character_tokenizer, script_parser, write_json
from torch import Tensor

from grpo.errors import ConfigError
from grpo.runtime.command import run_main
from grpo.runtime.sums import Sums
from grpo.types import Completion, Group, Prompt

P, G, LENGTH, VOCABULARY = 3, 4, 9, 24
LEARNING_RATE = 6.0  # SGD: large enough for the second step's ratios to leave [0.8, 1.2]


@dataclass(frozen=True)
class Case:
    """One setting of both trainers."""

    loss_type: str
    ours: dict[str, Any] = field(default_factory=dict)
    """Keys of our objective."""
    theirs: dict[str, Any] = field(default_factory=dict)
    """The same in TRL's GRPOConfig, where key or value differ."""
    steps: int = 2
    optimizer: str = "sgd"
    factor: float = 1.0
    """TRL's gradient divided by ours: not 1 where the two differ on purpose."""
    micro_batches: int = 1
    shape: tuple[int, int] = (P, G)
    """Prompts, completions of each."""
    trl_defaults: bool = False
    """Keep TRL's defaults where they differ from ours, instead of setting ours in TRL."""
    flat: float | None = None
    """Reward of every completion of the first prompt, instead of fixed_rewards."""
    contrast: float = 0.0
    """Difference of the flat rewards of one prompt and the next."""

    def groups(self) -> list[Group]:
        """Return the completions."""
        return fixed_groups(*self.shape)

    def rewards(self) -> dict[str, list[float]]:
        """Return the values of both rewards, one per completion."""
        if self.flat is None:
            return fixed_rewards()
        prompts, generations = self.shape
        earned = [self.flat + self.contrast * p for p in range(prompts) for _ in range(generations)]
        return {"first": earned, "second": [0.0] * len(earned)}

    @property
    def setting(self) -> str:
        """Describe the case in the table."""
        return ", ".join(f"{key} {value}" for key, value in self.ours.items()) or "defaults"


@dataclass
class Outcome:
    """One trainer's losses and gradients of each optimizer step, and its weights at the end."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    start: dict[str, Tensor] = field(default_factory=dict)
    """TRL: the weights before the first step."""
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
    made.append(Case("gspo", {"beta": 0.0}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}))
    made.append(Case("luspo", {"beta": 0.3, "importance_sampling_level": "token"}))
    return made


def masked_factor(loss_type: str) -> float:
    """Return TRL's gradient over ours with masked completions, which TRL's per-completion means count."""
    from grpo.losses import LOSSES

    per_completion = LOSSES.get(loss_type).per != "token"
    sequences = P * G
    return (
        (sequences - sum(not c.ended for g in fixed_groups() for c in g.completions)) / sequences
        if per_completion
        else 1
    )


def main() -> None:
    """Run the cases and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--only", help="only cases of this loss_type")
    options = parser.parse_args()
    rows = [compare(case) for case in cases() if options.only in (None, case.loss_type)]
    whole = compare(Case("dapo", {"beta": 0.3}, steps=5, optimizer="adamw")) if not options.only else None
    for row in rows:
        print(line(row))
    worst = max(max(row["loss"], row["gradient_norm"], row["gradient"]) for row in rows)
    print(f"{len(rows)} cases, largest relative difference {worst:.1e}")
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
            "five_steps": whole,
            "largest": worst,
        }
        write_json(options.output, report)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    factor = "" if row["factor"] == 1 else f"  (ours x {row['factor']:.3f}: on purpose)"
    return (
        f"{row['loss_type']:8} {row['setting']:60} loss {row['loss']:.1e}  norm {row['gradient_norm']:.1e}  "
        f"gradients {row['gradient']:.1e}  clipped {row['clipped']:.2f}{factor}"
    )


def compare(case: Case) -> dict[str, Any]:
    """Run one case. Return its row of the table: the largest relative differences over its optimizer steps."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        ours, theirs = run_ours(case, Path(folder)), run_trl(case, Path(folder))
    row = {"loss_type": case.loss_type, "setting": case.setting, "steps": case.steps, "factor": case.factor}
    row |= {"loss": 0.0, "gradient_norm": 0.0, "gradient": 0.0, "clipped": ours.clipped}
    for mine, other, mine_g, other_g in zip(ours.losses, theirs.losses, ours.gradients, theirs.gradients, strict=True):
        norm = total_norm(other_g)
        # A loss is a mean of terms of size 1 and both signs that cancel (advantages sum to 0). Float32 rounds
        # the terms, so a difference is compared with their size. tests/benchmarks/test_parity.py shows it
        # against float64.
        row["loss"] = max(row["loss"], abs(mine * case.factor - other) / max(abs(other), 1.0))
        row["gradient_norm"] = max(row["gradient_norm"], abs(total_norm(mine_g) * case.factor - norm) / norm)
        apart = total_norm({name: mine_g[name] * case.factor - other_g[name] for name in other_g})
        row["gradient"] = max(row["gradient"], apart / norm)
    row["weights"] = max(float((ours.weights[name] - theirs.weights[name]).abs().max()) for name in theirs.weights)
    apart = total_norm({name: ours.weights[name] - theirs.weights[name] for name in theirs.weights})
    row["moved"] = apart / total_norm({name: theirs.weights[name] - theirs.start[name] for name in theirs.weights})
    return row


def total_norm(gradients: dict[str, Tensor]) -> float:
    """Return the norm over all tensors, in float64."""
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))


def make_model(folder: Path) -> None:
    """Save a tiny Qwen2, far from uniform, with a tokenizer of single letters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    character_tokenizer("".join(chr(ord("a") + i) for i in range(VOCABULARY - 2))).save_pretrained(folder)
    torch.manual_seed(0)
    shape = Qwen2Config(
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
    model = Qwen2ForCausalLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)


def fixed_groups(prompts: int = P, generations: int = G) -> list[Group]:
    """Return groups of completions of uneven lengths; some are cut off at LENGTH."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    groups = []
    for p in range(prompts):
        prompt = draw(2, VOCABULARY, 3 + 2 * p)
        completions = []
        for _ in range(generations):
            [length] = draw(1, LENGTH + 3, 1)
            ended = length <= LENGTH
            ids = draw(2, VOCABULARY, length - 1) + [0] if ended else draw(2, VOCABULARY, LENGTH)
            completions.append(Completion(ids, [-1.0] * len(ids), ended, ""))
        groups.append(Group(Prompt(p, "".join(chr(ord("a") + i - 2) for i in prompt), tuple(prompt)), completions))
    return groups


def fixed_rewards() -> dict[str, list[float]]:
    """Return random values of two rewards, always the same."""
    generator = torch.Generator().manual_seed(2)
    return {
        "first": torch.randint(0, 3, (P * G,), generator=generator).tolist(),
        "second": torch.rand(P * G, generator=generator).tolist(),
    }


def run_ours(case: Case, folder: Path) -> Outcome:
    """Run a case through our compute_advantages and update: advantages, packing, objective, optimizer."""
    from types import SimpleNamespace

    from accelerate import Accelerator

    from grpo.config.schema import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
    from grpo.experience import ExperienceCollector, Sampled
    from grpo.policy import Policy
    from grpo.rewards.scoring import Scores
    from grpo.runtime.timing import Clock
    from grpo.trainer import update

    prompts, generations = case.shape
    config = Config(
        prompts_per_step=prompts,
        tokens_per_batch=40 if case.micro_batches == 1 else 20,
        objective=ObjectiveConfig(loss_type=case.loss_type, num_iterations=case.steps, **case.ours),
        optimizer=OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=1e9),
        sampling=SamplingConfig(num_generations=generations, max_completion_length=LENGTH),
        model=ModelConfig(name=str(folder)),
    )
    policy = Policy(
        Accelerator(cpu=True),
        str(folder),
        config.model,
        config.objective,
        config.optimizer,
        temperature=1.0,
        optimizer_steps=case.steps,
    )
    if case.optimizer == "sgd":
        # Where our gradient is a multiple of TRL's, the learning rate makes the steps equal.
        policy.strategy.prepared_optimizer = torch.optim.SGD(policy.model.parameters(), lr=LEARNING_RATE * case.factor)
    outcome = Outcome([], [], {})
    step, backward = policy.step, policy.backward
    running = [0.0]

    def watched_backward(loss: Tensor) -> None:
        running[0] += float(loss.detach())
        backward(loss)

    def watched_step(usable: bool = True) -> float:
        outcome.gradients.append({name: p.grad.clone() for name, p in policy.model.named_parameters()})
        outcome.losses.append(running[0])
        running[0] = 0.0
        return step(usable)

    policy.backward, policy.step = watched_backward, watched_step  # type: ignore[method-assign]
    by_name = {name: torch.tensor(v, dtype=torch.float64).reshape(case.shape) for name, v in case.rewards().items()}
    scores = Scores(by_name["first"] + 0.5 * by_name["second"], by_name)
    run: Any = SimpleNamespace(
        config=config,
        accelerator=policy.accelerator,
        policy=policy,
        beta=config.objective.beta,
    )
    unused: Any = None
    rewards: Any = SimpleNamespace(weights={"first": 1.0, "second": 0.5})
    collector = ExperienceCollector(config, policy.accelerator, policy, unused, unused, rewards)
    sums = Sums()
    sampled = Sampled(case.groups(), scores, list(range(prompts)))
    update(run, collector.compute_advantages(sampled, run.beta, sums), sums, Clock())
    outcome.weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    outcome.clipped = sums.mean("clipped")
    return outcome


def run_trl(case: Case, folder: Path) -> Outcome:
    """Run a case through TRL's GRPOTrainer.train(), whose rollout_func returns the fixed completions."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError('parity is measured against TRL: pip install -e ".[benchmark]"') from error
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, Qwen2ForCausalLM, TrainerCallback

    outcome = Outcome([], [], {})

    class Watched(trl.GRPOTrainer):
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
            trainer.running = 0.0

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [{"prompt": str(group.prompt.messages)} for group in case.groups()]
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) if case.optimizer == "sgd" else None
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
        outcome.start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    outcome.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    logged = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    outcome.flat_groups = logged[0]
    return outcome


def trl_rollouts(case: Case) -> Any:
    """Return TRL's rollout_func: prompts -> the fixed completions of each, in turn."""
    by_text = {str(group.prompt.messages): group for group in case.groups()}

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: dict[str, int] = {}
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "sample": []}
        for prompt in prompts:
            sample = seen[prompt] = seen.get(prompt, -1) + 1
            found["prompt_ids"].append(list(by_text[prompt].prompt.token_ids))
            found["completion_ids"].append(by_text[prompt].completions[sample].token_ids)
            found["sample"].append(sample)
        return found

    return rollouts


def trl_rewards(case: Case) -> list[Any]:
    """Return TRL's reward functions: the fixed rewards, looked up by prompt and sample."""
    generations, values = case.shape[1], case.rewards()
    rewards = {
        (str(group.prompt.messages), sample): {name: given[p * generations + sample] for name, given in values.items()}
        for p, group in enumerate(case.groups())
        for sample in range(generations)
    }

    def first(prompts: list[str], sample: list[int], **_: Any) -> list[float]:
        return [rewards[prompt, s]["first"] for prompt, s in zip(prompts, sample, strict=True)]

    def second(prompts: list[str], sample: list[int], **_: Any) -> list[float]:
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
    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=case.steps,
        per_device_train_batch_size=math.prod(case.shape) // case.micro_batches,
        gradient_accumulation_steps=case.micro_batches,
        num_generations=case.shape[1],
        num_iterations=case.steps,
        max_completion_length=LENGTH,
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        temperature=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,
        reward_weights=[1.0, 0.5],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **settings,
    )


if __name__ == "__main__":
    run_main(main)
