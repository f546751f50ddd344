"""Supervised continuation: train on corrected rows and on unchanged rows, close to the previous model on the latter.

The model would rarely sample the text of a correction, so a reward could not reinforce it: corrections are taught as
text first. GRPO can continue from there (`grpo community`), with the same previous model as its reference.

    a batch of 40, share 0.5          20 corrected rows                20 unchanged rows
    loss                              cross-entropy of the answer      the same + kl * KL(previous || new) per token

The KL covers unchanged rows only, because corrected answers are meant to change.
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

from grpo.data.rendering import prompts_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model

log = logging.getLogger(__name__)

Row = dict[str, Any]
Encoded = tuple[list[int], int]
"""(token ids of question, answer and end token, index of the answer's first token)."""


@dataclass(frozen=True)
class Continuation:
    """Settings. The optimizer starts anew from the given weights."""

    steps: int = 200
    batch: int = 40
    share: float = 0.5
    """Fraction of corrected rows in each batch."""
    kl: float = 0.3
    """Weight of the KL to the previous model."""
    learning_rate: float = 1e-3
    max_length: int = 512
    """Tokens of question and answer; longer rows are left out."""
    seed: int = 0


def continue_training(
    model_path: str, corrected: Sequence[Row], unchanged: Sequence[Row], output: Path, plan: Continuation
) -> Path:
    """Train a model further on both kinds of rows.

    Args:
        model_path: The previous model: the start, and the reference of the KL.
        corrected: Rows ({"question", "answer"}) whose answers people corrected.
        unchanged: Rows whose answers stay.
        output: The folder for the new model.
        plan: Settings.

    Returns:
        `output`.

    Raises:
        ConfigError: The share is not between 0 and 1, or there are no rows of one kind.
    """
    if not 0 < plan.share < 1:
        raise ConfigError(f"--share is {plan.share}, it must be between 0 and 1: both kinds of rows are needed")
    tokenizer = load_tokenizer(model_path)
    model, previous = load_model(model_path), load_model(model_path).requires_grad_(False)
    new, old = (encode(rows, tokenizer, plan.max_length) for rows in (corrected, unchanged))
    if not new or not old:
        raise ConfigError(f"there are {len(new)} corrected rows and {len(old)} others to train on: both are needed")
    take_new = min(max(1, round(plan.share * plan.batch)), plan.batch - 1)
    chance = random.Random(f"continuation {plan.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / plan.steps))
    model.train()
    for step in range(1, plan.steps + 1):
        batch = chance.choices(new, k=take_new) + chance.choices(old, k=plan.batch - take_new)
        loss, kl = losses(model, previous, batch, take_new)
        optimizer.zero_grad()
        (loss + plan.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, plan.steps // 4) == 0:
            log.info("step %d of %d: loss %.3f, KL to the previous model %.4f", step, plan.steps, loss, kl)
    model.eval().save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def losses(model: Any, previous: Any, batch: list[Encoded], corrected: int) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of all answers, and the KL to the previous model without the first `corrected` rows."""
    inputs, labels = padded(batch)
    counted = labels[:, 1:] != -100
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1][counted]
    loss = F.cross_entropy(logits, labels[:, 1:][counted])
    unchanged = torch.arange(len(batch))[:, None].expand_as(counted)[counted] >= corrected
    with torch.no_grad():
        reference = previous(input_ids=inputs, use_cache=False).logits[:, :-1][counted][unchanged]
    return loss, kl_per_token(reference, logits[unchanged])


def kl_per_token(previous_TV: Tensor, new_TV: Tensor) -> Tensor:
    """Return KL(previous || new) = sum_v p (log p - log q), averaged over tokens, in float32.

    Args:
        previous_TV: Logits of the previous model, [tokens, vocabulary].
        new_TV: Logits of the new model, the same shape.
    """
    log_p, log_q = previous_TV.float().log_softmax(-1), new_TV.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokenise rows. Those over `max_length` tokens are left out."""
    prompts = prompts_token_ids([[{"role": "user", "content": row["question"]}] for row in rows], tokenizer)
    examples = []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = prompt + tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= max_length:
            examples.append((ids, len(prompt)))
    return examples


def padded(batch: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Return inputs [S, T] and labels [S, T], -100 outside the answers. Padding on the right needs no mask."""
    width = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch])
    return inputs, labels
