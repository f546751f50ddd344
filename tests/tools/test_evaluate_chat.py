"""Commands on a saved model and its base: evaluate and chat."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config.schema import DataConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.models.logprob_model import use_grpo_attention
from grpo.rollout.engine import build_engine
from grpo.tools.chat_models import load_chat_models, stream_answers
from grpo.types import Prompt, SamplingPlan
from tests.fakes import tiny_data, tiny_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_evaluate_against_a_base(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "final", seed=0)
    tiny_folder(tmp_path / "base", seed=1)
    tiny_data(tmp_path / "test.jsonl", rows=6)
    (tmp_path / "environment.json").write_text(json.dumps({"derived": {"base_model": str(tmp_path / "base")}}))
    flags = ["--model", tmp_path / "final", "--base", "run", "--data.path", tmp_path / "test.jsonl", "--samples", "4"]
    flags += ["--output", tmp_path / "out.json", "--items", tmp_path / "items.jsonl", "--data.system_prompt=null"]
    flags += ["--sampling.max_completion_length=8"]
    done = subprocess.run([sys.executable, "launch/evaluate.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["items"] == report["base"]["items"] == 6
    assert report["metrics"]["eval/avg@4"] == report["sampled"]["metrics"]["eval/accuracy"]
    assert {"eval/pass@2", "eval/pass@4", "eval/accuracy_flexible"} <= report["metrics"].keys()
    assert report["change"]["accuracy"]["mcnemar_p"] == 1.0
    assert {"accuracy", "flexible"} == report["interval95"].keys() == report["change"].keys()
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(items) == 2 * 6 * (1 + 4) and sum(item["decoding"] == "greedy" for item in items) == 2 * 6
    assert {item["model"] for item in items} == {"base", "model"}
    assert {item["columns"]["pair_id"] for item in items} == set(range(6))
    assert items[-1]["question"] == "5+6=" and items[-1]["answer"] == "11"


def test_chat_streams_what_the_engine_would_decode(tmp_path: Path) -> None:
    for name, seed in (("final", 0), ("base", 1)):
        tiny_folder(tmp_path / name, seed=seed)
    by_name = load_chat_models(str(tmp_path / "final"), str(tmp_path / "base"))
    assert by_name["trained"].data == DataConfig(system_prompt=None)
    states = list(stream_answers(by_name, "1+2=", max_completion_length=9))
    for earlier, later in zip(states, states[1:], strict=False):
        assert all(later[name].startswith(earlier[name]) for name in by_name)
    for name, folder in (("trained", "final"), ("base", "base")):
        model, tokenizer = load_model(str(tmp_path / folder)), load_tokenizer(str(tmp_path / folder))
        engine = build_engine("native", model, tokenizer, slots=1, uses_packed_attention=use_grpo_attention(model))
        ids = tuple(tokenizer.encode("1+2=", add_special_tokens=False))
        [group] = engine.generate([Prompt(0, "1+2=", ids)], SamplingPlan(1, 9, 0.0, 0))
        assert states[-1][name] == group.completions[0].text


def damage(folder: Path, what: str) -> None:
    """Remove or damage a part of a model folder."""
    if what == "weights cut off":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif what == "an adapter alone":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif what == "nothing there":
        shutil.rmtree(folder)
    else:
        for file in folder.glob(what):
            file.unlink()


DAMAGES = {
    "config.json": "model.name '{}' cannot be loaded: the folder holds no config.json: copy it again",
    "*": "model.name '{}' cannot be loaded: the folder holds no config.json: copy it again",
    "an adapter alone": "the folder holds no config.json: it holds an adapter; merge it: python launch/export.py",
    "weights cut off": "model.name '{}' cannot be loaded: a weight file is damaged or was copied in part",
    "model.safetensors": "model.name '{}' cannot be loaded: Error no file named model.safetensors",
    "other shapes": "model.name '{}' cannot be loaded: its weights have other shapes than its config.json says",
    "tokenizer*": "model.name '{}': its tokenizer cannot be loaded: without tokenizer.json",
    "nothing there": "model.name '{}' cannot be loaded: there is no such folder",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_broken_model_folder_is_one_clear_error(tmp_path: Path, what: str) -> None:
    folder = tiny_folder(tmp_path / "final")
    damage(folder, what)
    with pytest.raises(ConfigError) as caught:
        load_chat_models(str(folder))
    assert DAMAGES[what].format(folder) in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.slow
def test_chat_with_a_broken_model_folder_ends_with_code_2(tmp_path: Path) -> None:
    damage(tiny_folder(tmp_path / "final"), "weights cut off")
    command = [sys.executable, "launch/chat.py", "--model", tmp_path / "final", "--ask", "1+1="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: model.name") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_chat_reads_questions_from_a_pipe(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "final")
    command = [sys.executable, "launch/chat.py", "--model", tmp_path / "final", "--max_completion_length=4"]
    done = subprocess.run(command, cwd=ROOT, input="1+1=\n2+2=\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained: ") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_chat_in_a_real_terminal_side_by_side(tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect", reason='pip install -e ".[test]"')
    for name, seed in (("final", 0), ("base", 1)):
        tiny_folder(tmp_path / name, seed=seed)
    by_name = load_chat_models(str(tmp_path / "final"), str(tmp_path / "base"))
    *_, expected = stream_answers(by_name, "1+2=", max_completion_length=6)
    command = ["launch/chat.py", "--model", str(tmp_path / "final"), "--base", str(tmp_path / "base")]
    command += ["--max_completion_length=6"]
    screen = pexpect.spawn(sys.executable, command, cwd=ROOT, dimensions=(30, 100), encoding="utf-8", timeout=240)
    screen.expect("question: ")
    screen.sendline("1+2=")
    screen.expect("question: ")
    last = [line for line in screen.before.splitlines() if expected["base"] in line and expected["trained"] in line]
    assert last, screen.before  # both answers in one line: side by side
    # Two panels, in a view that is drawn again as the answers grow (the cursor is hidden meanwhile).
    assert "base" in screen.before and "trained" in screen.before and screen.before.count("╭") >= 2
    assert "\x1b[?25l" in screen.before
    screen.sendline("")
    screen.expect(pexpect.EOF)
    screen.close()
    assert screen.exitstatus == 0
