"""Evaluation of given completions: the plan, the share of each rank, and the metrics by hand."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.rewards.scoring import RewardSum
from grpo.rollout.evaluation import evaluate, is_correct_in_any_format, summarize
from grpo.types import Completion, Group, Prompt, SamplingPlan

RIGHT, WRONG = "<reasoning>x</reasoning><answer>4</answer>", "it is 4"


class Engine:
    """Answers even draws in the right form, odd ones without it, and cuts off the second of several samples."""

    def generate(self, prompts: list[Prompt], plan: SamplingPlan, finished: Any = None) -> list[Group]:
        self.plan, self.draws = plan, [prompt.draw for prompt in prompts]
        samples = range(plan.num_generations)
        return [
            Group(
                p,
                [
                    Completion([1] * (2 + s), [-1.0] * (2 + s), s != 1, WRONG if p.draw % 2 or s else RIGHT)
                    for s in samples
                ],
            )
            for p in prompts
        ]


def evaluated(monkeypatch: pytest.MonkeyPatch, samples: int = 1, rank: int = 0, world: int = 1) -> tuple[Engine, Any]:
    monkeypatch.setattr("grpo.rollout.evaluation.gather_rows", lambda accelerator, rows: rows)
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world, autocast=contextlib.nullcontext)
    prompts = [Prompt(draw, "q", (5,), {"answer": "4"}) for draw in range(4)]
    engine: Any = Engine()
    return engine, evaluate(engine, prompts, accelerator, max_completion_length=9, samples=samples)


def test_one_greedy_completion_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, found = evaluated(monkeypatch)
    assert engine.plan == SamplingPlan(1, 9, 0.0, 0) and engine.draws == [0, 1, 2, 3]
    expected = {
        "eval/accuracy": 0.5,
        "eval/accuracy_low": pytest.approx(0.1500, abs=1e-4),
        "eval/accuracy_high": pytest.approx(0.8500, abs=1e-4),
        "eval/accuracy_ci95": pytest.approx(0.3500, abs=1e-4),
        "eval/accuracy_flexible": 1.0,
        "eval/format": 0.5,
        "eval/length_mean": 2.0,
        "eval/truncated_fraction": 0.0,
    }
    assert expected.items() <= found.metrics.items()


def test_several_samples_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 samples one is right for even draws: pass@2 is 1 - 3/4 * 2/3 = 0.5, pass@4 is 1; 0 for odd ones."""
    _, found = evaluated(monkeypatch, samples=4)
    assert found.metrics["eval/pass@2"] == pytest.approx(0.25) and found.metrics["eval/pass@4"] == 0.5
    assert "eval/pass@3" not in found.metrics
    assert found.metrics["eval/truncated_fraction"] == 0.25 and found.metrics["eval/length_mean"] == 3.5


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.3244), (8, 0.6756, 1.0)])
def test_the_interval_is_not_empty_where_all_answers_are_alike(right: int, low: float, high: float) -> None:
    """Wilson at 0 of 8: z^2 / (8 + z^2) = 3.8415 / 11.8415 = 0.3244."""
    row = {"format": 1.0, "length": 2, "ended": True, "sample": 0}
    rows = [row | {"draw": d, "accuracy": float(d < right), "flexible": 0.0} for d in range(8)]
    found = summarize(rows, 1)
    assert found["eval/accuracy_low"] == pytest.approx(low, abs=1e-4)
    assert found["eval/accuracy_high"] == pytest.approx(high, abs=1e-4)
    assert found["eval/accuracy_ci95"] == pytest.approx((high - low) / 2, abs=1e-4)


def test_the_rewards_of_the_run_judge_the_held_out_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Means over the prompts to which a reward applies, by short names; one that fails costs a warning."""
    monkeypatch.setattr("grpo.rollout.evaluation.gather_rows", lambda accelerator, rows: rows)
    (tmp_path / "mine.py").write_text(
        "def even(completions, number, **_):\n    return [None if n == 3 else float(n % 2 == 0) for n in number]\n"
        "def fails(completions, **_):\n    raise ValueError('no')\n"
    )
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, autocast=contextlib.nullcontext)
    prompts = [Prompt(draw, "q", (5,), {"answer": "4", "number": draw}) for draw in range(4)]
    engine: Any = Engine()
    rewards = RewardSum({f"{tmp_path}/mine.py:even": 1.0, "exact_match": 0.5})
    found = evaluate(engine, prompts, accelerator, max_completion_length=9, rewards=rewards)
    assert found.metrics["eval/reward/even/mean"] == pytest.approx(2 / 3)
    # Wilson at 2 of 3, with z^2 / 3 = 1.2805: (0.6667 + 0.6402 -+ sqrt(1.96^2 * 0.0741 + 0.41)) / 2.2805
    assert found.metrics["eval/reward/even/low"] == pytest.approx(0.2077, abs=1e-4)
    assert found.metrics["eval/reward/even/high"] == pytest.approx(0.9385, abs=1e-4)
    assert [row["rewards"]["even"] for row in found.rows] == [1.0, 0.0, 1.0, None]
    broken = RewardSum({f"{tmp_path}/mine.py:fails": 1.0})
    found = evaluate(engine, prompts, accelerator, max_completion_length=9, rewards=broken)
    assert not [key for key in found.metrics if key.startswith("eval/reward")] and found.metrics["eval/accuracy"] == 0.5


def test_the_interval_of_a_reward() -> None:
    """Of 0.2, 0.4, 0.6 over prompts: 0.4 +- 1.96 * 0.2 / sqrt(3). Ones alone: Wilson. One other value: unknown."""
    values = {"graded": [0.2, 0.4, 0.6], "ones": [1.0, 1.0, 1.0], "constant": [0.7, 0.7, 0.7]}
    rows = [
        {"draw": d, "accuracy": None, "format": 1.0, "length": 2, "ended": True}
        | {"rewards": {name: each[d] for name, each in values.items()}}
        for d in range(3)
    ]
    found = summarize(rows, 1)
    assert found["eval/reward/graded/high"] == pytest.approx(0.4 + 1.96 * 0.2 / math.sqrt(3), abs=1e-4)
    assert found["eval/reward/graded/ci95"] == pytest.approx(1.96 * 0.2 / math.sqrt(3), abs=1e-4)
    assert found["eval/reward/ones/low"] == pytest.approx(0.4385, abs=1e-4)  # 3 / (3 + 3.8415)
    assert found["eval/reward/constant/mean"] == pytest.approx(0.7)
    assert "eval/reward/constant/low" not in found and "eval/reward/constant/ci95" not in found


def test_ranks_share_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluated(monkeypatch, rank=1, world=2)[0].draws == [1, 3]


def test_rows_without_a_gold_answer_are_not_judged() -> None:
    row = {"draw": 0, "format": 1.0, "length": 2, "ended": True}
    rows = [row | {"accuracy": 1.0, "flexible": 1.0}, row | {"draw": 1, "accuracy": None, "flexible": None}]
    assert summarize(rows, 1)["eval/accuracy"] == 1.0
    assert summarize(rows, 1)["eval/format"] == 1.0


def test_the_last_number_counts_in_any_format() -> None:
    assert is_correct_in_any_format("first 3, then 4", "4") and not is_correct_in_any_format("4, no: 3", "4")


def test_the_settings_of_the_evaluation_reach_the_engine() -> None:
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, autocast=contextlib.nullcontext)
    engine: Any = Engine()
    limits = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    prompts = [Prompt(0, "q", (5,), {"answer": "4"})]
    evaluate(engine, prompts, accelerator, max_completion_length=9, samples=2, temperature=0.7, seed=3, limits=limits)
    assert engine.plan == SamplingPlan(2, 9, 0.7, 3, 0.9, 5, 0.1, 1.1)
