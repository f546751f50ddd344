"""final/: complete or not at all, with its step; finished by a resume, and never exported as another step's."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.parser import load_config
from grpo.errors import ConfigError, StorageError
from grpo.run import state
from grpo.run.final import final_step, write_final
from grpo.tools import export as export_tool
from grpo.tools.export import export
from grpo.trainer import train
from tests.test_trainer import arguments, run

SETTINGS = {"eval_every": 0, "prompts_per_step": 2}


class Killed(BaseException):
    """The end of the process before final/ is written."""


def killed_before_final(folder: Path, name: str, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def write(*args: object, **kwargs: object) -> None:
            raise Killed

        patch.setattr(state, "write_final", write)
        with pytest.raises(Killed):
            run(folder, name, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_killed_before_its_final_is_finished_and_no_older_one_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(tmp_path, "run", steps=1, **SETTINGS)
    first = weights(folder / "final")
    assert final_step(folder) == 1
    killed_before_final(tmp_path, "run", steps=3, resume="auto", save_total_limit=1, **SETTINGS)
    assert final_step(folder) == 1
    with pytest.raises(ConfigError, match=r"final is of step 1, and the run has a checkpoint of step 3: add --step 3"):
        export(folder, "merged")
    export(folder, "merged", tmp_path / "as-it-is", step=1)  # its checkpoint was pruned; final/ has the same weights
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(tmp_path / "as-it-is").items())

    with caplog.at_level(logging.INFO):
        run(tmp_path, "run", steps=3, resume="auto", **SETTINGS)
    assert "all 3 steps are done, but final/ is not of step 3: writing it" in caplog.text
    run(tmp_path, "whole", steps=3, **SETTINGS)
    assert equal(folder / "final", tmp_path / "whole" / "final") and final_step(folder) == 3
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    export(folder, "merged")
    assert equal(folder / "export" / "merged", folder / "final")
    with pytest.raises(ConfigError, match="has done all 3 steps: raise steps to go on"):
        train(load_config(arguments(tmp_path, "run", steps=3, resume="auto", **SETTINGS)))
    with pytest.raises(ConfigError, match="has done all 2 steps"):
        train(load_config(arguments(tmp_path, "run", steps=2, resume="auto", **SETTINGS)))

    (folder / "final" / "training.json").unlink()  # as an older version wrote it
    os.utime(folder / "final" / "config.json", (1, 1))
    with pytest.raises(ConfigError, match="final is of an earlier step, and the run has a checkpoint of step 3"):
        export(folder, "merged", tmp_path / "again")


def test_the_card_names_the_step_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "run", steps=2, save_every=0, **SETTINGS)
    (tmp_path / "run" / "checkpoints" / "step-2").rename(tmp_path / "moved")
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 3, "reward/mean": 0.5}\n')
    export_tool.main(["--run", str(tmp_path / "run"), "--format", "merged"])
    assert ", 2 steps." in (tmp_path / "run" / "export" / "merged" / "README.md").read_text()


def test_final_is_whole_or_not_there(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model").write_text("new")
        (folder.parent / "adapter").mkdir()
        (folder.parent / "adapter" / "model").write_text("new adapter")

    def fail(folder: Path) -> None:
        save(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="cannot write .*final: .*No space left on device"):
        write_final(tmp_path, 1, 2, fail, main=True)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".tmp-final").mkdir()  # of a run that was killed
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    write_final(tmp_path, 2, 2, save, main=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "final"]
    assert sorted(os.listdir(tmp_path / "final")) == ["model", "training.json"]
    assert json.loads((tmp_path / "final" / "training.json").read_text()) == {"format": 1, "step": 2, "steps": 2}
    assert (tmp_path / "adapter" / "model").read_text() == "new adapter"


def test_the_dtype_of_final_is_that_of_the_base(tmp_path: Path) -> None:
    """bfloat16 in, bfloat16 out, half the size; checkpoints stay float32; save_dtype decides otherwise."""
    from transformers import AutoModelForCausalLM

    arguments(tmp_path, "run")  # makes the model
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    run(tmp_path, "base", steps=1, **SETTINGS)
    run(tmp_path, "chosen", steps=1, save_dtype="float32", **SETTINGS)
    run(tmp_path, "lora", steps=1, **SETTINGS, **{"lora.r": 2})
    kinds = {
        name: {t.dtype for t in weights(tmp_path / name / "final").values()} for name in ("base", "chosen", "lora")
    }
    assert kinds == {"base": {torch.bfloat16}, "chosen": {torch.float32}, "lora": {torch.bfloat16}}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "final")
    assert loaded.dtype == torch.bfloat16
    exact, rounded = weights(tmp_path / "chosen" / "final"), weights(tmp_path / "base" / "final")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    saved = load_file(tmp_path / "base" / "checkpoints" / "step-1" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    export(tmp_path / "base", "merged", tmp_path / "exported", step=1)
    assert equal(tmp_path / "exported", tmp_path / "base" / "final")


def test_what_a_checkpoint_had_no_room_for_is_kept_in_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last save, and that of a signal."""
    from grpo.run import checkpointer

    def full(run_dir: Path, step: int, *rest: Any) -> Path:
        raise StorageError(f"cannot save the checkpoint step-{step}")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "save_checkpoint", full)
        with pytest.raises(StorageError, match=r"step-2.*The model after step 2 is in .*final") as caught:
            train(load_config(arguments(tmp_path, "run", steps=2, save_every=0, **SETTINGS)))
    assert caught.value.exit_code == 3
    run(tmp_path, "whole", steps=2, **SETTINGS)
    assert equal(tmp_path / "run" / "final", tmp_path / "whole" / "final")
    assert final_step(tmp_path / "run") == 2
