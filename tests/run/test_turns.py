"""Training with several turns: records, metrics, evaluation, exact resume, two ranks."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from grpo.errors import ConfigError
from tests.fakes import tiny_data, tiny_model
from tests.rollout.test_turns import ENDS
from tests.rollout.turns_tokenizer import TEMPLATE, char_tokenizer
from tests.run.test_resume import checkpoints_equal
from tests.runtime.test_distributed import CPU_2, launch
from tests.test_trainer import CHANGING, run

ENVIRONMENT = '''
class Echo:
    """Answers two turns with their length. Reward: the number of turns, and the share of "a" in the last one."""

    def __init__(self, word="len"):
        self.turns, self.word = 0, word

    def reset(self, prompt):
        return [{"role": "user", "content": f"{self.word} {prompt.columns['pair_id']}?"}]

    def step(self, completion):
        self.turns += 1
        reward = self.turns + completion.count("a") / (1 + len(completion))
        return [{"role": "user", "content": f"{self.word} {len(completion)}"}], reward, self.turns == 3
'''


def settings(folder: Path, **changes: object) -> dict[str, object]:
    """Write model, data and environment, and return the settings of a run with them."""
    if not (folder / "echo.py").exists():
        tokenizer = char_tokenizer()
        tokenizer.save_pretrained(folder / "model")
        model = tiny_model(spread=2.0, vocab_size=len(tokenizer))
        model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=1)
        model.set_attn_implementation("sdpa")
        model.save_pretrained(folder / "model")
        tiny_data(folder / "data.jsonl")
        (folder / "echo.py").write_text(ENVIRONMENT)
        (folder / "count_a.py").write_text("")
    return {
        "environment": f"{folder}/echo.py:Echo",
        "environment_kwargs": "{word: n}",
        "rewards": '{"environment": 1.0}',
        "sampling.max_completion_length": 40,
        "turns.workers": 0,
        **changes,
    }


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_records_of_a_run_with_an_environment(tmp_path: Path) -> None:
    changes = {"steps": 1, "save_every": 0, "data.eval_path": tiny_data(tmp_path / "few.jsonl", rows=3)}
    metrics = run(tmp_path, "run", **settings(tmp_path, **changes))
    rollouts = rows_of(tmp_path / "run", "rollouts")
    assert len(rollouts) == 3 * 4
    turns = [[m for m in row["turns"]["messages"] if m["role"] == "assistant"] for row in rollouts]
    step = metrics[1]
    assert step["rollout/turns"] == pytest.approx(sum(map(len, turns)) / len(rollouts))
    tokens = sum(m["tokens"] for own in turns for m in own)
    assert step["rollout/turn_length"] == pytest.approx(tokens / sum(map(len, turns)))
    assert step["rollout/length_mean"] == pytest.approx(tokens / len(rollouts))
    assert step["policy/sampling_logprob_difference"] < 1e-4
    assert step["policy/clip_fraction"] == 0 and step["tools/failures"] == 0
    for row in rollouts:
        messages = row["turns"]["messages"]
        assert row["completion"] == [m["content"] for m in messages if m["role"] == "assistant"][-1]
        answered = sum(m["role"] == "user" for m in messages)
        known = row["turns"]["reward"]  # of the last turn that ended, whether what follows it fits or not
        assert answered == 0 if known is None else int(known) in (answered, answered + 1)
    evaluated = rows_of(tmp_path / "run", "evaluations")
    assert all(row["turns"]["messages"][0]["role"] == "assistant" for row in evaluated if "turns" in row)
    assert {m["role"] for row in evaluated for m in row.get("turns", {}).get("messages", [])} == {"assistant", "user"}


def test_a_config_that_cannot_have_turns_is_refused_before_weights(tmp_path: Path) -> None:
    given = settings(tmp_path)
    for changes, message in [
        ({"tools": "[calculator]"}, "tools and environment are both set"),
        ({"environment": "json:JSONDecoder"}, "is not a class with reset"),
        ({"environment": "null", "tools": "[python]"}, "set turns.trust_model_code true"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, "refused", **(given | changes))
    tokenizer = char_tokenizer(TEMPLATE.replace("<end>", ""))
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="does not begin with an end token of the model"):
        run(tmp_path, "refused", **given)


@pytest.mark.slow
def test_resume_is_exact_with_turns(tmp_path: Path) -> None:
    given = settings(tmp_path, **{"turns.workers": 2})
    whole = run(tmp_path, "whole", **given)
    run(tmp_path, "parts", **given, steps=2)
    (tmp_path / "echo.py").write_text(ENVIRONMENT + "# edited\n")
    with pytest.raises(ConfigError, match=r"environment '.*echo.py:Echo' has changed .*\[environment\]"):
        run(tmp_path, "parts", **given, resume="auto")
    (tmp_path / "echo.py").write_text(ENVIRONMENT)
    rows = run(tmp_path, "parts", **given, resume="auto")
    assert len(rows) == len(whole) == 5
    for row, other in zip(rows[3:], whole[3:], strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(CHANGING)} == {
            k: v for k, v in other.items() if not k.startswith(CHANGING)
        }
    assert rows_of(tmp_path / "parts", "rollouts")[-12:] == rows_of(tmp_path / "whole", "rollouts")[-12:]
    assert checkpoints_equal(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_ranks_sample_and_learn_the_same_with_turns(tmp_path: Path) -> None:
    given = settings(tmp_path)
    del given["turns.workers"]
    given |= {"tokens_per_batch": 1024, "data.max_prompt_length": 40, "save_every": 0}
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(
            lambda name: launch(tmp_path, name, CPU_2 if name == "two" else [CPU_2[0]], **given), ("one", "two")
        )
    assert one.code == two.code == 0, one.stderr + two.stderr
    for mine, theirs in zip(one.records("metrics"), two.records("metrics"), strict=True):
        for key in ("rollout/turns", "rollout/length_mean", "reward/mean", "tools/failures", "policy/grad_norm"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key
    first, second = (AutoModelForCausalLM.from_pretrained(end.folder / "final") for end in (one, two))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
