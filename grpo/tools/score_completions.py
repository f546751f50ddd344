"""Score completions from a file with the rewards of a config."""

import json
from pathlib import Path
from typing import Any

from grpo.config.schema import Config
from grpo.data.files import read_table
from grpo.errors import ConfigError
from grpo.rewards.scoring import RewardSum
from grpo.tracking.rollout_reader import with_columns
from grpo.types import Completion, Group, Prompt


def score_file(config: Config, path: str, output: str | None) -> None:
    """Write the rows of `path` with their rewards to `output`, or print them."""
    scored = score_rows(config, with_columns(read_table(path, "--completions").rows))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    if output:
        Path(output).write_text(lines, encoding="utf-8")
        print(f"{len(scored)} completions scored: {output}")
    else:
        print(lines, end="")


def score_rows(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Score completions.

    A prompt given as text means that rewards get completions as text; a prompt of messages gives messages. Rows of a
    run's rollouts.jsonl are accepted too: their completions become messages.

    Args:
        config: Its `rewards` are used.
        rows: {"prompt", "completion", + columns}.

    Returns:
        The same rows with "rewards" (by name, unweighted) and "reward" (the weighted sum). None: not applicable.

    Raises:
        ConfigError: A row has no "prompt" or no "completion".
    """
    if not rows:
        return []
    score = RewardSum(config.rewards, config.reward_kwargs)
    groups = [_group(number, row) for number, row in enumerate(rows, start=1)]
    score.check_columns({name for group in groups for name in group.prompt.columns})
    scores = score(groups)
    scored = []
    for index, row in enumerate(rows):
        by_name = {name: _number(values[index, 0]) for name, values in scores.by_name.items()}
        scored.append({**row, "rewards": by_name, "reward": _number(scores.rewards_PG[index, 0])})
    return scored


def _group(number: int, row: dict[str, Any]) -> Group:
    if "prompt" not in row or "completion" not in row:
        raise ConfigError(f"--completions, row {number}: needs 'prompt' and 'completion', has {', '.join(row)}")
    columns = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(columns.get("columns"), dict) and "draw" in columns:  # a row of rollouts.jsonl
        columns = {"question": prompt, **columns["columns"]}
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, list):
        completion = completion[-1]["content"] if completion else ""
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = row.get("completion_ids") or []
    return Group(Prompt(number, prompt, (), columns), [Completion(ids, [], True, str(completion))])


def _number(value: Any) -> float | None:
    number = float(value)
    return None if number != number else number
