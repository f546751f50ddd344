"""Limits of a model that its config states: refused before weights load, or a warning if it only gets worse."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.families import ROWS
from grpo.models.limits import Extent, check_limits
from grpo.rollout.engine import find_engine
from grpo.trainer import train
from tests.fakes import save_tokenizer, tiny_data, tiny_folder
from tests.models.zoo import ZOO, tiny_config


def config_of(folder: Path, **more: object) -> Config:
    settings = {"model.name": folder, "sampling.max_completion_length": 16} | more
    return load_config([f"--{key}={value}" for key, value in settings.items()])


def folder_of(name: str, path: Path, **changes: object) -> Path:
    """A folder with the config and tokenizer of a zoo model, without weights."""
    save_tokenizer(path)
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(path)
    return path


def check(folder: Path, longest: int = 20, largest_id: int = 5, **more: object) -> None:
    check_limits(config_of(folder, **more), str(folder), load_tokenizer(str(folder)), Extent(longest, largest_id))


def test_the_extent_of_prompts() -> None:
    extent = Extent()
    for ids in ((3, 9, 1), (7,), ()):
        extent.add(ids)
    assert extent == Extent(longest_prompt=3, largest_id=9)


def test_token_ids_beyond_the_embeddings(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, vocab_size=40)
    check(folder, largest_id=39)
    with pytest.raises(ConfigError, match=r"a prompt contains token 40 .* has embeddings for 40 tokens only"):
        check(folder, largest_id=40)


@pytest.mark.parametrize(("name", "limit"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_positions_of_a_table(name: str, limit: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path, **{limit: 36})
    check(folder, longest=20)  # 20 + 16
    with pytest.raises(ConfigError, match="has 36 positions, but the longest prompt and sampling"):
        check(folder, longest=21)


def test_families_that_run_on_rows_name_the_engine_that_runs_them(tmp_path: Path) -> None:
    names = {entry.model_type: name for name, entry in ZOO.items() if entry.model_type in ROWS}
    assert names.keys() == ROWS.keys()
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    for kind, name in names.items():
        folder = tmp_path / name
        tiny_config(name).save_pretrained(folder)
        for engine, needs_packed_attention in (("native", True), ("transformers", False)):
            assert find_engine(engine).needs_packed_attention == needs_packed_attention
            arguments = (config_of(folder, **{"rollout.engine": engine}), str(folder), tokenizer)
            with pytest.raises(ConfigError) if needs_packed_attention else nullcontext() as raised:
                check_limits(*arguments, Extent(5, 5), needs_packed_attention=needs_packed_attention)
            if raised is not None:
                text = f"its family {kind} {ROWS[kind]}. Set rollout.engine to transformers"
                assert str(raised.value).endswith(text)


@pytest.mark.parametrize(("name", "has_loss"), [("llama", False), ("deepseek_v3", False), ("qwen3_moe", True)])
def test_a_router_loss_needs_a_family_that_has_one(name: str, has_loss: bool, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    check(folder, **{"objective.router_aux_loss_coef": 0.0})
    key = {"objective.router_aux_loss_coef": 0.01}
    if has_loss:
        check(folder, **key)
        return
    with pytest.raises(ConfigError, match=rf"coef is 0.01, but .* \({name}\) has no routers that a loss balances"):
        check(folder, **key)


def test_rotary_positions_beyond_the_trained_ones_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    folder = folder_of("llama", tmp_path, max_position_embeddings=30)
    with caplog.at_level(logging.WARNING):
        check(folder, longest=20)
    assert "was made for 30 positions, and the longest prompt" in caplog.text


def test_rotary_frequencies_that_depend_on_the_batch(tmp_path: Path) -> None:
    folder = folder_of("phi3 longrope", tmp_path)
    check(folder, longest=240)  # 240 + 16 = 256
    with pytest.raises(ConfigError, match=r"as soon as a sequence exceeds 256 tokens \(rope_type longrope\)"):
        check(folder, longest=241)


@pytest.mark.parametrize("source", ["tokenizer_config.json", "generation_config.json"])
def test_end_tokens_outside_the_vocabulary(source: str, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, vocab_size=40)
    if source == "generation_config.json":
        (folder / source).write_text(json.dumps({"eos_token_id": [0, 48]}))
    else:
        tokenizer = load_tokenizer(str(folder))
        tokenizer.eos_token = "="  # the last character
        tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"the end token 4\d in {source} is outside the vocabulary of 40 tokens"):
        check(folder)


def test_a_prompt_longer_than_a_batch(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    settings = {"data.max_prompt_length": "null", "tokens_per_batch": 100}
    check(folder, longest=84, **settings)
    with pytest.raises(ConfigError, match="the longest prompt has 85 tokens .* Set tokens_per_batch to at least 101"):
        check(folder, longest=85, **settings)


def test_a_run_refuses_before_weights_load(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()  # not needed to find out
    tiny_data(tmp_path / "data.jsonl")
    config = config_of(
        folder,
        **{
            "data.path": tmp_path / "data.jsonl",
            "data.system_prompt": "null",
            "data.max_prompt_length": "null",
            "tokens_per_batch": 18,
            "run_dir": tmp_path / "run",
            "rewards": '{"tests.letters:count_letters": 1.0}',
            "scoring.workers": 0,
        },
    )
    with pytest.raises(ConfigError, match="the longest prompt has 6 tokens"):
        train(config)
