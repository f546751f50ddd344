"""Names of saved models: a wrong folder is named at once, with the folder that was meant."""

from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.tools import chat, evaluate
from grpo.tools.saved_model import check_model, resolve_base


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """outputs/first with a model, outputs/second without one."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "outputs" / "first" / "final").mkdir()
    (tmp_path / "outputs" / "first" / "final" / "config.json").write_text("{}")
    return tmp_path / "outputs"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("outputs/first", "--model outputs/first is a run directory: its model is outputs/first/final"),
        ("outputs/second", "--model outputs/second is a run directory without final/: the run did not end. Finish it"),
        ("outputs", "--model outputs is a folder of runs: the model of the newest is outputs/"),
        ("outputs/frist", "there is no such folder. outputs holds 2 runs: the model of first is outputs/first/final"),
        ("outputs/frist/final", "there is no such folder. outputs holds 2 runs: the model of first is outputs/first"),
        ("a/b/c", "model.name 'a/b/c' cannot be loaded: there is no such folder"),
        ("./nothing", "model.name './nothing' cannot be loaded: there is no such folder"),
    ],
)
def test_a_wrong_folder_is_named_before_the_hub_is_asked(runs: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(model)
    assert message in str(caught.value)
    for command in (evaluate.main, chat.main):
        with pytest.raises(ConfigError) as said:
            command(["--model", model])
        assert str(said.value) == str(caught.value)
    with pytest.raises(ConfigError) as of_base:
        resolve_base("outputs/first/final", model)
    assert str(of_base.value) == str(caught.value).replace("--model", "--base")


@pytest.mark.parametrize("model", ["outputs/first/final", "Qwen/Qwen3-0.6B", "gpt2", "owner/name/file.gguf"])
def test_folders_hub_ids_and_gguf_files_pass(runs: Path, model: str) -> None:
    check_model(model)
    assert resolve_base("x", model) == model
