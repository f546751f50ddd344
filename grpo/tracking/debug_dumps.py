"""Debug dumps: batches and completions of a failed step -> run_dir/faults/. Training goes on."""

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
"""Completions stored per step and process, so that a reward that always fails does not fill the disk."""


def dump_batches(run_dir: Path, step: int, rank: int, batches: list[PackedBatch]) -> Path:
    """Store the batches of a step that was skipped because its loss or gradient was not finite.

    The file is faults/step-N-rank-R.safetensors. It has each tensor of grpo.packing.PackedBatch as "0.input_ids_T",
    "1.input_ids_T", ... "0.spans" has a row (start, prompt length, completion lengths ..., padded with -1) for each
    group.

    Returns:
        The path of the file.
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
    with contextlib.suppress(OSError):  # a full disk must not stop training
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return path


def dump_failures(run_dir: Path, step: int, rank: int, groups: list[Group], scores: Scores) -> list[str]:
    """Store the completions that a reward could not judge in faults/step-N-rank-R.jsonl.

    Returns:
        A message for each reward that failed.
    """
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
