"""Checkpointer: state of older trainers, counters after a failed step, and runs that are done."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.run.checkpoint import save_checkpoint
from grpo.run.checkpointer import FORMAT, Checkpointer, check_is_unfinished, migrate, restore


def test_state_from_before_draws_were_counted() -> None:
    old = {"step": 7, "config": {"prompts_per_step": 3, "objective.beta": 0.04}}
    new = migrate(old)
    assert old.items() <= new.items()
    assert (new["format"], new["progress"]) == (FORMAT, {"draws": 21, "beta": 0.04})
    assert (new["sampled_ahead"], new["stream"], new["skipped_in_a_row"], new["reward_sources"]) == ([], {}, 0, {})
    assert "progress" not in old
    assert migrate(old | {"progress": {"draws": 5, "beta": 0.1}})["progress"] == {"draws": 5, "beta": 0.1}


def test_counters_go_back_to_the_last_complete_step(tmp_path: Path) -> None:
    collector: Any = SimpleNamespace(prompts_drawn=6)
    unused: Any = None
    made = Checkpointer(tmp_path, Config(), unused, unused, collector, lambda: ({}, {}), start=2, beta=0.04)
    collector.prompts_drawn = 9  # drawn by a step that the engine did not finish
    assert made.restore_completed() == 2 and collector.prompts_drawn == 6


def test_a_run_that_is_done_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps are trained; with final/ missing it goes on; with final/ of the last step it is refused."""
    for steps, final, is_refused in [(5, None, False), (4, None, False), (4, 3, False), (4, 4, True), (3, 3, True)]:
        monkeypatch.setattr("grpo.run.checkpointer.final_step", lambda run_dir, final=final: final)
        with pytest.raises(ConfigError, match="raise steps") if is_refused else contextlib.nullcontext():
            check_is_unfinished(tmp_path, 4, Config(steps=steps), tmp_path)


def test_a_checkpoint_restores_every_counter(tmp_path: Path) -> None:
    state = {
        "step": 4,
        "progress": {"draws": 8, "beta": 0.1},
        "stream": {"epoch": 2},
        "config": {},
        "first_eval": {"eval/accuracy": 0.25},
        "last_eval": {"eval/accuracy": 0.5},
    }
    path = save_checkpoint(tmp_path, 4, {"model": {"weight": torch.ones(1)}}, state, keep=1)
    loaded: list[Any] = []
    policy: Any = SimpleNamespace(broadcasts_checkpoint=False, load_state_dict=lambda *parts: loaded.append(parts))
    stream: Any = SimpleNamespace(load_state_dict=loaded.append)
    point = restore(path, Config(steps=5), policy, stream)
    assert (point.start, point.prompts_drawn, point.beta) == (4, 8, 0.1)
    assert (point.first_eval, point.last_eval) == (state["first_eval"], state["last_eval"])
    assert loaded[0][0]["model"]["weight"].item() == 1 and loaded[1] == {"epoch": 2}
