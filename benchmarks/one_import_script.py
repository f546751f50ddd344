"""A script for TRL, of the kind that its users write. benchmarks/one_import.py runs it on both libraries."""

import os

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

LETTERS = "abcd"
rows = [{"prompt": f"{a}+{b}=", "target": a} for a in LETTERS for b in "efghij"]


def target_share(completions, target, **kwargs):
    """Share of a completion's letters that are the target."""
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, target, strict=True)]


def short(completions, **kwargs):
    """A little for one to six letters."""
    return [1 if 1 <= len(text) <= 6 else 0 for text in completions]


args = GRPOConfig(
    output_dir=os.environ["OUT"],
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    num_generations=8,
    max_completion_length=12,
    max_steps=int(os.environ.get("STEPS", "6")),
    num_iterations=int(os.environ.get("ITERATIONS", "2")),
    learning_rate=3e-3,
    beta=0.05,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    loss_type=os.environ.get("LOSS", "dapo"),
    reward_weights=[1.0, 0.2],
    shuffle_dataset=False,
    bf16=False,
    use_cpu=True,
    logging_steps=int(os.environ.get("ITERATIONS", "2")),
    save_strategy="no",
    seed=int(os.environ.get("SEED", "7")),
)
trainer = GRPOTrainer(
    model=os.environ["MODEL"],
    reward_funcs=[target_share, short],
    args=args,
    train_dataset=Dataset.from_list(rows),
)
trainer.train()
