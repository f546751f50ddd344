"""Continuation: a model + rows that people corrected + rows it knew before -> the model, corrected, and otherwise as it was.

What a correction says is text that the model would hardly ever sample, so no reward could find it: it is taught first, as
text. GRPO can then go on from there (launch/community.py), with the same previous model as its reference.

    a batch of 40, share 0.5          20 corrected rows                20 rows from before
    loss                              cross-entropy of the answer      the same + kl * KL(previous || new) per token

The KL holds the rows from before only: what was corrected is meant to change.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.data.stream import prompts_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """How to go on. New optimizer, old weights: this is no resume."""

    steps: int = 200
    batch: int = 40
    share: float = 0.5
    """Corrected rows in each batch, where there are any."""
    kl: float = 0.3
    """Weight of the KL to the previous model."""
    learning_rate: float = 1e-3
    longest: int = 512
    """Tokens of question and answer; longer rows are left out."""
    seed: int = 0


def continue_training(
    model_path: str,
    corrected: Sequence[Row],
    before: Sequence[Row],
    output: Path,
    plan: Continuation,
) -> Path:
    """Train `model_path` further on both kinds of rows (`question`, `answer`), into the folder `output`."""
    if not 0 < plan.share < 1:
        raise ConfigError(f"--share is {plan.share}, it must be between 0 and 1: both kinds of rows are needed")
    tokenizer = load_tokenizer(model_path)
    model, previous = load_model(model_path), load_model(model_path).requires_grad_(False)
    new, old = (encode(rows, tokenizer, plan.longest) for rows in (corrected, before))
    if not new or not old:
        raise ConfigError(f"there are {len(new)} corrected rows and {len(old)} others to train on: both are needed")
    take_new = min(max(1, round(plan.share * plan.batch)), plan.batch - 1)
    chance = random.Random(f"continuation {plan.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / plan.steps))
    model.train()
    for step in range(plan.steps):
        batch = chance.choices(new, k=take_new) + chance.choices(old, k=plan.batch - take_new)
        inputs, labels = padded(batch)
        counted = labels[:, 1:] != -100
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1][counted]
        loss = F.cross_entropy(logits, labels[:, 1:][counted])
        from_before = torch.arange(len(batch))[:, None].expand_as(counted)[counted] >= take_new
        with torch.no_grad():
            reference = previous(input_ids=inputs, use_cache=False).logits[:, :-1][counted][from_before]
        kl = kl_per_token(reference, logits[from_before])
        optimizer.zero_grad()
        (loss + plan.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, plan.steps // 4) == 0:
            log.info("  step %d of %d: loss %.3f, KL to the previous model %.4f", step + 1, plan.steps, loss, kl)
    model.eval().save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def kl_per_token(previous_TV: Tensor, new_TV: Tensor) -> Tensor:
    """KL(previous || new) = sum_v p (log p - log q), averaged over tokens; [T, V] logits, in float32."""
    log_p, log_q = previous_TV.float().log_softmax(-1), new_TV.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def encode(rows: Sequence[Row], tokenizer: Any, longest: int) -> list[tuple[list[int], int]]:
    """Rows -> (the ids of question, answer and end, where the answer starts). Longer ones are left out."""
    prompts = prompts_token_ids([[{"role": "user", "content": row["question"]}] for row in rows], tokenizer)
    examples = []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = prompt + tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= longest:
            examples.append((ids, len(prompt)))
    return examples


def padded(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """-> inputs [S, T] and labels [S, T], -100 outside the answers. Padding on the right needs no mask."""
    width = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch])
    return inputs, labels
