"""Config errors are raised before any weight loads: `model.name` does not exist, and no test reaches it."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.run import build, claim
from grpo.run.build import batch_for_memory, build_run, derived_values, held_out_prompts
from grpo.run.claim import warn_of_slow_saves
from tests.fakes import tiny_data, tiny_folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.path=missing.jsonl"], "data.path: there is no file missing.jsonl"),
        (["--data.question=query"], "there is no column 'query' .columns there: question, answer, pair_id."),
        (["--data.extractor=boxed"], "0 of 12 answers fit extractor 'boxed'.*set data.extractor"),
        (["--data.name=gsm9k"], "unknown dataset 'gsm9k': did you mean 'gsm8k'"),
        (['--rewards={"acuracy": 1}'], "unknown reward 'acuracy': did you mean 'accuracy'"),
        (['--rewards={"nowhere.py:f": 1}'], "there is no file .*nowhere.py"),
        (["--rollout.engine=nativ"], "unknown engine 'nativ': did you mean 'native'"),
        (["--objective.loss_type=gpro"], "unknown loss 'gpro': did you mean 'grpo'"),
        (["--resume=outputs/none/checkpoints/step-3"], "resume: there is no folder"),
        ([], "model.name '.*no-such-model' cannot be loaded|its tokenizer cannot be loaded"),
    ],
)
def test_errors_before_weights(tmp_path: Path, flags: list[str], message: str) -> None:
    tiny_data(tmp_path / "data.jsonl")
    base = [
        f"--model.name={tmp_path / 'no-such-model'}",
        f"--data.path={tmp_path / 'data.jsonl'}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(ConfigError, match=message):
        build_run(load_config([*base, *flags]))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_needs_a_column_the_data_lacks(tmp_path: Path) -> None:
    tiny_data(tmp_path / "data.jsonl")
    (tmp_path / "mine.py").write_text("def needy(completions, hint):\n    return [0.0 for _ in completions]\n")
    rewards = f'{{"{tmp_path}/mine.py:needy": 1.0}}'
    flags = ["--model.name=nowhere", f"--data.path={tmp_path / 'data.jsonl'}", f"--rewards={rewards}", "--run_dir=x"]
    with pytest.raises(ConfigError, match="needs the column 'hint'.*answer, pair_id, question, solution"):
        build_run(load_config(flags))


def test_a_reference_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.fakes import tiny_model

    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    other = tiny_model(vocab_size=50)
    other.set_attn_implementation("sdpa")
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    flags = [
        f"--model.name={tmp_path / 'model'}",
        f"--model.reference={tmp_path / 'other'}",
        f"--data.path={tmp_path / 'data.jsonl'}",
        f"--run_dir={tmp_path / 'run'}",
        "--data.system_prompt=null",
        "--tracking.report_to=[]",
    ]
    before = multiprocessing.active_children()
    with pytest.raises(ConfigError, match="a vocabulary of 50, the policy one of 42"):
        build_run(load_config(flags))
    assert [child.name for child in multiprocessing.active_children() if child not in before] == []  # reward workers


def test_effective_values_for_the_trackers() -> None:
    config = load_config(["--model.name=m", "--steps=100", "--prompts_per_step=4", "--sampling.num_generations=16"])
    values = derived_values(config, prompts=200, run_name="run-1")
    assert values["batch_size"] == 64
    assert values["num_train_epochs"] == 2.0
    assert values["learning_rate"] == 1e-6
    assert values["run_name"] == "run-1"


def test_held_out_prompts_over_the_limit_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = SimpleNamespace(chat_template=None, bos_token_id=None, encode=lambda text, **_: list(text))
    data = cast(Any, SimpleNamespace(tokenizer=tokenizer, stream=None))
    rows = [Example(text) for text in ("a", "abc", "ab", "abcd")]
    config = load_config(["--model.name=m", "--data.max_prompt_length=2"])
    with caplog.at_level("WARNING"):
        assert len(held_out_prompts(config, rows, data)) == 2
    assert caplog.messages == [
        "2 of 4 held-out prompts are longer than data.max_prompt_length 2 tokens, and are not evaluated",
    ]


@pytest.mark.parametrize(("limit", "seconds", "said"), [(30.0, 15.1, True), (30.0, 15.0, False), (None, 99.0, False)])
def test_a_save_that_torchrun_would_cut_short_is_said_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: float | None,
    seconds: float,
    said: bool,
) -> None:
    monkeypatch.setattr(claim, "shutdown_seconds", lambda: limit)
    monkeypatch.setattr(claim, "seconds_to_write", lambda run_dir, size: seconds)
    warn_of_slow_saves(tmp_path, 2 * 10**9)
    assert ("a checkpoint of 2.0 GB takes about 15 s to save here, and torchrun kills" in caplog.text) == said


def test_batches_are_smaller_where_a_cpu_has_little_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True)
    for free, tokens, longest, expected in (
        (3 << 30, 8192, 500, 8192),
        (1 << 30, 8192, 500, 2048),
        (1 << 30, 8192, 3000, 3000),  # the longest must fit
        (1 << 30, 1024, 500, 1024),
        (1 << 30, 8192, None, 8192),
    ):
        monkeypatch.setattr(build, "free_memory", lambda device, free=free: free)
        assert batch_for_memory(tokens, longest, accelerator) == expected
    assert sum("batches of 2048 tokens instead of tokens_per_batch 8192" in line for line in caplog.messages) == 1
