"""The training loop on a tiny model: its files, exact resume, and learning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config.parser import load_config
from grpo.errors import ConfigError
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder

CHANGING = ("time/", "memory/", "rollout/tokens_per_second")


def arguments(tmp_path: Path, run: str, **changes: object) -> list[str]:
    if not (tmp_path / "model").exists():
        tiny_folder(tmp_path / "model")
        tiny_data(tmp_path / "data.jsonl")
    if not (tmp_path / "count_a.py").exists():  # runs that go on side by side read it
        (tmp_path / "count_a.py").write_text(
            "def count_a(completions, **columns):\n"
            "    return [sum(c == 'a' for c in completion[0]['content']) / 8 for completion in completions]\n"
        )
    settings = {
        "model.name": tmp_path / "model",
        "data.path": tmp_path / "data.jsonl",
        "data.eval_path": tmp_path / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": tmp_path / run,
        "steps": 4,
        "prompts_per_step": 3,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 8,
        "optimizer.learning_rate": 0.003,
        "optimizer.lr_scheduler_type": "constant",
        "objective.beta": 0.01,
        "eval_every": 2,
        "save_every": 1,
        "save_total_limit": 10,
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "rewards": json.dumps({f"{tmp_path}/count_a.py:count_a": 1.0}),
        "tokens_per_batch": 1024,
    } | changes
    return [f"--{key}={value}" for key, value in settings.items()]


def run(tmp_path: Path, name: str, **changes: object) -> list[dict]:
    folder = train(load_config(arguments(tmp_path, name, **changes)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_models_own_attention_learns_the_same(tmp_path: Path) -> None:
    ours = run(tmp_path, "ours", steps=2)
    theirs = run(tmp_path, "eager", steps=2, **{"model.attn_implementation": "eager", "rollout.engine": "transformers"})
    for row, other in zip(ours, theirs, strict=True):
        for key, value in row.items():
            if not key.startswith(CHANGING):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    with pytest.raises(ConfigError, match="model.name .* cannot be loaded"):
        run(tmp_path, "none", **{"model.attn_implementation": "no_such", "rollout.engine": "transformers"})


def test_a_run_leaves_everything_behind(tmp_path: Path) -> None:
    rows = run(tmp_path, "run")
    folder = tmp_path / "run"
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["policy/clip_fraction"] == 0  # on-policy: every ratio is exactly 1
    assert abs(rows[1]["policy/kl"]) < 1e-9  # and the reference is still the policy
    assert all(row["policy/sampling_logprob_difference"] < 1e-5 for row in rows[1:])
    assert {"eval/accuracy", "eval/format"} <= rows[0].keys() & rows[2].keys() & rows[4].keys()
    documented = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    for key in rows[2]:
        assert key == "step" or key in documented or "count_a" in key, f"{key} is not in docs/metrics.md"
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4 * 3 * 4
    assert {row["columns"]["pair_id"] for row in rollouts if row["sample"] == 0} <= set(range(12))
    assert all(("columns" in row) == (row["sample"] == 0) for row in rollouts)
    assert load_config([f"--config={folder / 'config.yaml'}"]) == load_config(arguments(tmp_path, "run"))
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    AutoTokenizer.from_pretrained(folder / "final")
    stored = load_file(folder / "checkpoints" / "step-4" / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize(("stop", "iterations", "mini_batches"), [(1, 1, 1), (3, 1, 2), (1, 2, 1), (3, 2, 5)])
def test_resume_is_exact_to_the_bit(tmp_path: Path, stop: int, iterations: int, mini_batches: int) -> None:
    extra = {"objective.num_iterations": iterations, "objective.mini_batches": mini_batches}
    extra["optimizer.lr_scheduler_type"] = "cosine"
    whole = run(tmp_path, "whole", **extra)
    # A run that is stopped after step `stop` leaves its checkpoint and the records up to there: take the rest away.
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in range(stop + 1, 5):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{later}")
    shutil.rmtree(tmp_path / "part" / "final")
    resumed = run(tmp_path, "part", resume="auto", **extra)

    def fixed(rows: list[dict]) -> list[dict]:
        return [{key: value for key, value in row.items() if not key.startswith(CHANGING)} for row in rows]

    assert fixed(resumed) == fixed(whole)
    for name in ("model", "optimizer"):
        first = load_file(tmp_path / "whole" / "checkpoints" / "step-4" / f"{name}.safetensors")
        second = load_file(tmp_path / "part" / "checkpoints" / "step-4" / f"{name}.safetensors")
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_gradient_does_not_depend_on_packing(tmp_path: Path) -> None:
    run(tmp_path, "wide", steps=2)
    run(tmp_path, "narrow", steps=2, tokens_per_batch=24, **{"data.max_prompt_length": 16})
    wide = load_file(tmp_path / "wide" / "final" / "model.safetensors")
    narrow = load_file(tmp_path / "narrow" / "final" / "model.safetensors")
    for key in wide:
        assert torch.allclose(wide[key], narrow[key], atol=1e-5), key


def test_it_learns_to_write_what_is_rewarded(tmp_path: Path) -> None:
    rows = run(tmp_path, "learn", steps=40, eval_every=0, save_every=0, prompts_per_step=8, **{"objective.beta": 0})
    first = sum(row["reward/mean"] for row in rows[:5]) / 5
    last = sum(row["reward/mean"] for row in rows[-5:]) / 5
    assert first < 0.1
    assert last > 0.5


def test_a_run_directory_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, "run", steps=1)
    with pytest.raises(ConfigError, match="resume"):
        run(tmp_path, "run", steps=1)


def same(first: list[dict], second: list[dict]) -> bool:
    drop = lambda rows: [{k: v for k, v in row.items() if not k.startswith(CHANGING)} for row in rows]  # noqa: E731
    return drop(first) == drop(second)


@pytest.mark.parametrize(
    "extra",
    [
        {"sampling.dynamic_sampling": True, "sampling.oversample": 1.5, "eval_every": 0},
        {"objective.kl_target": 0.01, "objective.kl_horizon": 20, "eval_every": 0},
    ],
    ids=["dynamic_sampling", "adaptive_kl"],
)
def test_what_a_run_has_come_to_is_resumed_too(tmp_path: Path, extra: dict) -> None:
    import shutil

    whole = run(tmp_path, "whole", **extra)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in (3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{later}")
    shutil.rmtree(tmp_path / "part" / "final")
    assert same(run(tmp_path, "part", resume="auto", **extra), whole)
    first = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    second = load_file(tmp_path / "part" / "final" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_dynamic_sampling_learns_from_full_batches_and_stops_at_its_cap(tmp_path: Path) -> None:
    rows = run(tmp_path, "run", eval_every=0, **{"sampling.dynamic_sampling": True, "sampling.max_sampling_rounds": 3})
    for row in rows:
        assert row["rollout/groups_trained"] == 3 or row["rollout/sampling_rounds"] == 3
        assert row["rollout/groups_sampled"] >= row["rollout/groups_trained"]
    assert max(row["rollout/groups_sampled"] for row in rows) > 3  # this model writes few a: many groups are flat
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    draws = sorted({row["draw"] for row in written})
    assert draws == list(range(len(draws)))  # no prompt is skipped, none is drawn twice
    flat = {}
    for row in written:
        flat.setdefault(row["draw"], []).append(row["advantage"])
    assert sum(any(values) for values in flat.values()) == sum(row["rollout/groups_trained"] for row in rows)


def test_flat_groups_move_nothing_not_even_by_weight_decay(tmp_path: Path) -> None:
    """R11. Flat groups change nothing: no decay, no momentum."""
    (tmp_path / "always.py").write_text("def always(completions, **columns):\n    return [1.0] * len(completions)\n")
    changes = {"objective.beta": 0, "optimizer.weight_decay": 0.1, "rewards": f'{{"{tmp_path}/always.py:always": 1.0}}'}
    rows = run(tmp_path, "flat", steps=2, eval_every=0, **changes)
    assert all(row["reward/zero_std_fraction"] == 1.0 for row in rows)
    start = load_file(tmp_path / "model" / "model.safetensors")
    final = load_file(tmp_path / "flat" / "final" / "model.safetensors")
    assert all(torch.equal(start[name], final[name]) for name in start)


def test_adaptive_kl_moves_beta_by_its_formula(tmp_path: Path) -> None:
    rows = run(tmp_path, "run", eval_every=0, **{"objective.kl_target": 0.01, "objective.kl_horizon": 60})
    beta = 0.01
    for row in rows:  # 3 prompts x 4 completions of a horizon of 60
        assert row["policy/beta"] == pytest.approx(beta, rel=1e-12)
        beta *= 1 + min(max(row["policy/kl"] / 0.01 - 1, -0.2), 0.2) * 12 / 60
    assert rows[-1]["policy/beta"] != 0.01


@pytest.mark.parametrize(
    "extra",
    [
        {"objective.loss_type": "gspo", "objective.num_iterations": 2},
        {"objective.loss_type": "cispo"},
        {"objective.loss_type": "rloo"},
        {"objective.loss_type": "gfpo"},
        {"objective.loss_type": "reinforce_plus_plus", "objective.beta": 0.05, "objective.kl_in_reward": True},
        {"objective.subset": "max_variance", "objective.subset_size": 2},
        {"objective.entropy_coef": 0.001},
        {"objective.soft_overlong_cache": 2},
        {"objective.multi_objective_aggregation": "normalize_then_sum"},
        {"rollout.correction": "truncate"},
    ],
    ids=lambda extra: "-".join(str(value) for value in extra.values()),
)
def test_every_variant_trains(tmp_path: Path, extra: dict) -> None:
    rows = run(tmp_path, "run", steps=2, eval_every=0, save_every=0, prompts_per_step=6, **extra)
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    assert any(row["policy/grad_norm"] > 0 for row in rows)


def test_kl_in_the_reward_is_taken_off_before_comparing(tmp_path: Path) -> None:
    """At step 1 the policy equals the reference: KL 0, the same advantages. Later the estimate is logged per token."""
    wide = {"steps": 3, "eval_every": 0, "prompts_per_step": 8}
    plain = run(tmp_path, "plain", **wide, **{"objective.beta": 0})
    inside = run(tmp_path, "inside", **wide, **{"objective.beta": 0.5, "objective.kl_in_reward": True})
    assert plain[0]["policy/grad_norm"] > 0
    assert inside[0]["policy/grad_norm"] == pytest.approx(plain[0]["policy/grad_norm"], rel=1e-3)
    assert abs(inside[0]["policy/kl"]) < 1e-9 < inside[2]["policy/kl"]


@pytest.mark.slow
def test_a_student_comes_near_its_teacher(tmp_path: Path) -> None:
    """On-policy distillation: the reference is another model, and no reward has a weight."""
    tiny_folder(tmp_path / "teacher", seed=1)
    settings = {"model.reference": tmp_path / "teacher", "objective.beta": 1.0, "prompts_per_step": 8, "steps": 60}
    arguments(tmp_path, "student")
    silent = json.dumps({f"{tmp_path}/count_a.py:count_a": 0.0})
    rows = run(tmp_path, "student", eval_every=0, save_every=0, rewards=silent, **settings)
    assert rows[-1]["policy/kl"] < 0.5 * rows[0]["policy/kl"]
    assert rows[-1]["policy/loss"] > 0  # the KL itself, without a reward
