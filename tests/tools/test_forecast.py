"""Forecast: intervals by hand and by simulation, and a probe of a tiny run that leaves nothing behind."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.tools import forecast as forecast_module
from grpo.tools.check import main
from grpo.tools.forecast import Observed, Probe, forecast, probe, summarize
from grpo.tools.forecast_advice import advice
from grpo.tools.forecast_statistics import (
    DRIFT,
    NOISE,
    WALK,
    Trend,
    count_values,
    fit_dirichlet,
    flat_by_size,
    flat_chance,
    log_beta_binomial,
    next_seconds,
    proportion,
    quantiles,
    student_t,
)
from tests.fakes import tiny_data, tiny_folder


@pytest.mark.parametrize(("freedom", "value"), [(1, 6.3138), (2, 2.9200), (3, 2.3534), (4, 2.1318), (20, 1.7247)])
def test_student_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert student_t(freedom) == pytest.approx(value, rel=1e-3)


def test_beta_binomial_of_a_uniform_prior_is_uniform() -> None:
    """B(k + 1, n - k + 1) C(n, k) = 1 / (n + 1)."""
    assert [math.exp(log_beta_binomial(k, 4, 1.0, 1.0)) for k in range(5)] == pytest.approx([0.2] * 5)
    assert quantiles([0.2] * 5) == (0, 4)
    assert quantiles([0.04, 0.02, 0.88, 0.02, 0.04]) == (1, 3)


def test_proportions() -> None:
    """The quantiles of Beta(5.5, 5.5), by symmetry around a half. At 0, the interval begins there."""
    half = proportion(5, 10)
    assert half.low + half.high == pytest.approx(1, abs=1e-3) and half.low == pytest.approx(0.262, abs=1e-3)
    assert (proportion(0, 10).value, proportion(0, 10).low) == (0, 0)
    assert proportion(10, 10).low == pytest.approx(1 - proportion(0, 10).high, abs=1e-3)


def test_a_trend_of_one_step_is_the_mean_and_the_prior_of_a_drift() -> None:
    trend = Trend([1, 1, 1, 1], [1.0, 2.0, 3.0, 2.0])
    assert trend.at(1) == pytest.approx((2.0, 1 / 4))
    assert trend.at(3) == pytest.approx((2.0, 1 / 4 + (2 * DRIFT) ** 2 + 2 * WALK**2))  # two steps later
    spread = math.sqrt(2 / 3)
    assert trend.mean(1, 2).high == pytest.approx(2 + student_t(3) * spread * math.sqrt(1 / 2 + 1 / 4))
    assert trend.mean(1, 2, (0, 3)).high == 3


def test_intervals_cover_what_they_say() -> None:
    """2,000 simulated probes of 24 groups and steps of 8, with a share of 0.3 and a mean of 10 that rises by 0.3."""
    rng = random.Random(0)
    means, shares, count = 0, 0, 2000
    for _ in range(count):
        steps = [1] * 8 + [1] * 8 + [2] * 8
        lengths = Trend(steps, [rng.gauss(10 + 0.3 * step, 3) for step in steps]).mean(4, 8)
        means += lengths.low <= sum(rng.gauss(10 + 0.3 * 4, 3) for _ in range(8)) / 8 <= lengths.high
        share = Trend(steps, [float(rng.random() < 0.3) for _ in steps]).share(2, 8)
        shares += share.low - 1e-9 <= sum(rng.random() < 0.3 for _ in range(8)) / 8 <= share.high + 1e-9
    assert means / count == pytest.approx(0.95, abs=0.02)  # the simulation has no irregular change
    assert shares / count == pytest.approx(0.95, abs=0.02)  # whole numbers of groups: more than 0.9


def test_seconds_of_one_step_have_the_width_of_the_prior() -> None:
    found = next_seconds([2.0], machine=0.0)
    assert found.value == pytest.approx(2.0)
    assert found.high == pytest.approx(2 * math.exp(student_t(2) * NOISE * math.sqrt(2)))
    many = next_seconds([1.0, 4.0] * 50, 100, machine=0.0)
    assert many.value == pytest.approx(2.5, rel=0.03) and 2.1 < many.low < many.high < 3.1  # the arithmetic mean


def test_flat_groups_by_size() -> None:
    """With p ~ Beta(1, 1), E[p^G + (1 - p)^G] = 2 / (G + 1). The last column differs from itself."""
    sizes = torch.tensor([2.0, 4.0, 9.0], dtype=torch.float64)
    uniform = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64).clamp(min=1e-9)
    assert flat_chance(uniform, sizes)[0].tolist() == pytest.approx([2 / 3, 2 / 5, 1 / 5], abs=1e-6)
    assert count_values([[1, 1, 0], [0, 0, 0]]).tolist() == [[1, 2, 0], [3, 0, 0]]  # 0 is the commonest


def test_the_fit_finds_the_distribution_of_pass_rates() -> None:
    """400 prompts with p ~ Beta(2, 1) and 8 completions each: E[p^G + (1-p)^G] is 2/(G+2) + 2/((G+1)(G+2))."""
    rng = random.Random(1)
    groups = []
    for _ in range(400):
        p = rng.betavariate(2, 1)
        groups.append([float(rng.random() < p) for _ in range(8)])
    counts = count_values(groups)
    alpha = fit_dirichlet(counts, torch.ones(1, len(counts), dtype=torch.float64))[0]
    assert alpha[0] == pytest.approx(2, rel=0.25) and alpha[1] == pytest.approx(1, rel=0.25)
    found = flat_by_size(groups, 0.15, [8, 16])
    exact = {size: 2 / (size + 2) + 2 / ((size + 1) * (size + 2)) for size in (8, 16)}
    assert all(found.shares[size].low < exact[size] < found.shares[size].high for size in exact)
    assert found.smallest is not None and found.smallest.low <= 13 <= found.smallest.high  # 2/15 + 2/210 = 0.143


def test_rewards_that_never_vary_say_nothing_about_other_sizes() -> None:
    assert flat_by_size([[0.0] * 4] * 10, 0.2, [8]).smallest is None
    assert flat_by_size([[0.0] * 4] * 10, 0.2, [8]).shares == {}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    settings = {
        "model.name": tmp_path / "model",
        "data.path": tmp_path / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": tmp_path / "run",
        "steps": 20,
        "prompts_per_step": 2,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 6,
        "scoring.workers": 0,
        "eval_every": 10,
        "data.eval_size": 2,
        "rewards": '{"tests.letters:count_letters": 1.0}',
    }
    return load_config([f"--{key}={value}" for key, value in settings.items()])


def test_a_probe_measures_and_leaves_nothing(config: Config, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = forecast(config, 0.002, 0.2)
    assert sorted(tmp_path.rglob("*")) == before  # no run directory
    assert found.groups_now >= 4 and found.trained_steps >= 1 and found.steps_left == 20
    assert min(prompt.draw for prompt in found.prompts) == 40  # the prompts after the 20 steps of 2
    assert all(prompt.completions == 4 for prompt in found.prompts)
    assert [step.step for step in found.next_steps] == [1, 2, 3, 4, 5]
    assert found.peak_gib > 0 and found.hours.low < found.hours.value < found.hours.high
    assert found.seconds.value == pytest.approx(math.exp(sum(map(math.log, later := found.step_seconds[1:] or
        found.step_seconds)) / len(later)))  # fmt: skip
    assert 0 <= found.length.low <= found.length.value <= found.length.high <= 6
    assert sum(share.value for share in found.pass_rates.values()) == pytest.approx(1)


def test_a_probe_of_a_run_that_drops_flat_groups(config: Config) -> None:
    sampling = dataclasses.replace(config.sampling, dynamic_sampling=True, max_sampling_rounds=2)
    found = probe(dataclasses.replace(config, sampling=sampling), 0.01)
    assert len(found.seconds) >= 1 and found.steps_left == 20
    assert min(group.draw for group in found.groups) == 80  # after 20 steps of 2 prompts in 2 rounds


def test_a_probe_of_a_run_that_samples_ahead(config: Config) -> None:
    rollout = dataclasses.replace(config.rollout, max_staleness=1)
    found = probe(dataclasses.replace(config, rollout=rollout), 0.01)
    assert len(found.seconds) >= 1 and len(found.now) >= 4


def test_the_command_prints_the_forecast(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--model.name={config.model.name}", f"--data.path={config.data.path}", "--data.system_prompt=null"]
    flags += ["--prompts_per_step=2", "--sampling.num_generations=2", "--sampling.max_completion_length=4", "--steps=3"]
    flags += ["--scoring.workers=0", "--eval_every=0", f"--run_dir={tmp_path / 'run'}", "--tracking.report_to=[]"]
    main([*flags, "--probe", "0.001", "--output", str(tmp_path / "check.json")])
    printed = capsys.readouterr().out
    for words in ("forecast, with 90 % intervals", "smallest num_generations", "3 steps to the end", "is not forecast"):
        assert words in printed
    stored = json.loads((tmp_path / "check.json").read_text())["forecast"]
    assert len(stored["next_steps"]) == 3 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("minutes", "share", "says"),
    [(0, 0.2, "--probe 0: give the minutes"), (1, 1.0, "--flat_share 1: give a share between 0 and 1")],
)
def test_arguments_outside_their_range(config: Config, minutes: float, share: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        forecast(config, minutes, share)


def test_several_processes_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--probe measures one process"):
        forecast(config, 1, 0.2)


def group(values: list[float], length: int = 5, ended: bool = True, texts: int = 4) -> Observed:
    """A group of the policy as it is now."""
    flat = min(values) == max(values)
    return Observed(1, 0, "?", values, values, [length] * len(values), [ended] * len(values), texts, flat)


def advised(groups: list[Observed], changes: dict[str, object] | None = None, **probed: object) -> list[str]:
    """The keys that are recommended for a run of these groups."""
    found = Probe(groups, 1, [1.0], [{"rollout": 1.0}], 1.0, 9.0, [100], 10, 1.0)
    config = load_config(["--rewards={accuracy: 1.0}", *(f"--{key}={value}" for key, value in (changes or {}).items())])
    result = summarize(dataclasses.replace(found, **probed), config, 0.2)  # type: ignore[arg-type]
    assert result.advice == advice(result, config, on_cpu=found.on_cpu) or probed
    return [line.partition(":")[0] for line in result.advice]


MIXED, SOLVED, FAILED = [1.0, 0.0, 1.0, 0.0], [1.0] * 4, [0.0] * 4
SIZE = {"sampling.num_generations": 4, "sampling.max_completion_length": 9}


def test_advice_about_flat_groups() -> None:
    assert advised([group(MIXED)] * 20, SIZE) == []
    rare = [group([1.0, 0.0, 0.0, 0.0])] * 12 + [group(FAILED)] * 8  # a larger group finds the rare right answer
    assert [line.split()[0] for line in advised(rare, SIZE)] == ["sampling.num_generations"]
    split = [group(SOLVED)] * 10 + [group(FAILED)] * 9 + [group(MIXED)]  # it does not find what is not there
    assert advised(split, SIZE) == ["sampling.dynamic_sampling true", "curriculum.reward accuracy"]
    narrow = [group(SOLVED, texts=1)] * 10 + [group(FAILED, texts=1)] * 10
    assert advised(narrow, SIZE | {"sampling.temperature": 0.5}) == ["sampling.temperature 1.0"]
    assert advised([group(FAILED)] * 20, SIZE) == ["other prompts or an easier reward"]


def test_advice_about_lengths_and_memory() -> None:
    cut = [group(MIXED, length=9, ended=False)] * 5 + [group(MIXED)] * 15
    assert advised(cut, SIZE) == ["sampling.max_completion_length 18"]
    assert advised([group(MIXED)] * 20, SIZE | {"sampling.max_completion_length": 100}) == [
        "sampling.max_completion_length 8"
    ]
    assert advised([group(MIXED)] * 20, SIZE, free_gib=0.1) == ["tokens_per_batch 4096"]
    assert advised([group(MIXED)] * 20, SIZE, on_cpu=False, batches=[100] * 8) == ["tokens_per_batch 16384"]


def test_a_probe_of_a_resumed_run_is_of_the_steps_after_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.tools.replay import train_until

    monkeypatch.setattr(forecast_module, "MAX_STEPS", 1)
    config = dataclasses.replace(config, eval_every=0)
    train_until(config, 2)
    found = probe(dataclasses.replace(config, resume="auto"), 0.01)
    assert found.steps_left == 18
