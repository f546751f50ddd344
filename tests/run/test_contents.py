"""A resume notices data, base model and reference that hold something else than before."""

import shutil
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.errors import ConfigError
from grpo.run import contents
from grpo.run.contents import check_contents, hash_files, hash_model, hash_prompts
from grpo.trainer import train
from grpo.types import Prompt
from tests.fakes import tiny_folder
from tests.test_trainer import arguments, run

SETTINGS = {"eval_every": 1, "prompts_per_step": 2}


def test_changed_answers_and_held_out_rows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "run", steps=1, **SETTINGS)
    data = tmp_path / "data.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0].replace("####", "#### 9"), *lines[1:-1]]) + "\n")
    run(tmp_path, "run", steps=2, resume="auto", **SETTINGS)
    said = [text.partition(" since ")[0] for text in caplog.messages if text.startswith("resume: the ")]
    assert said == ["resume: the training data has changed", "resume: the held-out rows have changed"]


def test_the_base_of_an_adapter_that_was_replaced_is_refused(tmp_path: Path) -> None:
    settings = SETTINGS | {"eval_every": 0, "lora.r": 2}
    run(tmp_path, "run", steps=1, **settings)
    shutil.rmtree(tmp_path / "model")
    tiny_folder(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match=r"the weights of model\.name '.*model' have changed since the checkpoint"):
        train(load_config(arguments(tmp_path, "run", steps=2, resume="auto", **settings)))
    run(tmp_path, "run", steps=2, resume="auto", allow_changes="[model.name]", **settings)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--objective.beta=0"], []),  # the weights are those of the checkpoint
        (["--objective.beta=0.1"], ["base"]),  # the reference is a copy of the base
        (["--objective.beta=0.1", "--model.reference=r"], ["reference"]),
        (["--objective.beta=0", "--lora.r=4"], ["base"]),
        (["--objective.beta=0.1", "--model.reference=r", "--lora.r=4"], ["base", "reference"]),
    ],
)
def test_what_the_checkpoint_does_not_hold_must_not_change(flags: list[str], refused: list[str]) -> None:
    config = load_config(["--model.name=m", *flags])
    for name in ("base", "reference"):
        if name in refused:
            with pytest.raises(ConfigError, match="have changed since the checkpoint was written"):
                check_contents({name: "a"}, {name: "b"}, config)
        else:
            assert [text[:12] for text in check_contents({name: "a"}, {name: "b"}, config)] == ["resume: the "]
        assert check_contents({name: "a"}, {name: "a"}, config) == []
        assert check_contents({}, {name: "a"}, config) == []  # a checkpoint of an older version


def test_hashes_depend_on_content_and_order_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(index, f"{index}", (index,), {"answer": "1", "when": object()}) for index in range(3)]
    assert hash_prompts(prompts) == hash_prompts([*prompts]) != hash_prompts(prompts[::-1])
    assert hash_prompts([]) is None
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").write_bytes(bytes(300_000))
        (tmp_path / name / "notes.txt").write_text(name)
    assert hash_model(str(tmp_path / "one")) == hash_model(str(tmp_path / "two"))
    file = tmp_path / "two" / "a.safetensors"
    content = bytearray(300_000)
    content[150_000] = 1
    file.write_bytes(content)
    assert hash_model(str(tmp_path / "one")) != hash_model(str(tmp_path / "two"))
    monkeypatch.setattr(contents, "WHOLE_BYTES", 1000)  # pieces of a large model
    monkeypatch.setattr(contents, "STRIDE", 100_000)
    assert hash_files([tmp_path / "one" / "a.safetensors"]) != hash_files([file])
    assert hash_files([tmp_path / "nothing"]) is None
