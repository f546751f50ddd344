"""Faults: what went wrong in a step -> run_dir/faults/, so that it can be looked at afterwards. Training goes on."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo.packing import PackedBatch
from grpo.rewards.scoring import Scores
from grpo.types import Group

MAX_ROWS = 16
"""Examples per step and process: a reward that is always late must not fill the disk."""


def dump_batches(run_dir: Path, step: int, rank: int, batches: list[PackedBatch]) -> Path:
    """The batches of a step that was skipped because its loss or gradient was not finite.

    -> faults/step-N-rank-R.safetensors: each tensor of grpo.packing.PackedBatch as "0.input_ids_T", "1.input_ids_T", ...;
    "0.spans" holds a row (start, prompt length, completion lengths ..., padded with -1) for each group.
    """
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
        rows = [[span.start, span.prompt_length, *span.completion_lengths] for span in batch.spans]
        width = max(map(len, rows), default=0)
        tensors[f"{index}.spans"] = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    path = run_dir / "faults" / f"step-{step}-rank-{rank}.safetensors"
    with contextlib.suppress(OSError):  # a full disk is no reason to end the run here
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return path


def dump_failures(run_dir: Path, step: int, rank: int, groups: list[Group], scores: Scores) -> list[str]:
    """The completions that a reward could not judge -> faults/step-N-rank-R.jsonl, and a line about each reward."""
    if not scores.failures:
        return []
    completions = [(group.prompt, completion) for group in groups for completion in group.completions]
    path = run_dir / "faults" / f"step-{step}-rank-{rank}.jsonl"
    rows = [
        {
            "step": step,
            "reward": failure.reward,
            "reason": failure.reason,
            "draw": completions[failure.index][0].draw,
            "prompt": completions[failure.index][0].messages,
            "completion": completions[failure.index][1].text,
        }
        for failure in scores.failures[:MAX_ROWS]
    ]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = []
    for name in dict.fromkeys(failure.reward for failure in scores.failures):
        mine = [failure for failure in scores.failures if failure.reward == name]
        lines.append(
            f"reward '{name}' could not judge {len(mine)} of {len(completions)} completions of step {step} (the first: "
            f"{mine[0].reason}); they are in {path}"
        )
    return lines
