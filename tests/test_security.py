"""Security: completions, datasets, checkpoints and model folders cannot run code, read secrets or leave the run
directory.

SECURITY.md lists who is trusted."""

import json
import logging
import os
import pickle
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from grpo.config.parser import load_config
from grpo.config.schema import Config, TrackingConfig
from grpo.data.rows import load_examples
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, GrpoError, StorageError
from grpo.models.loading import load_model
from grpo.models.lora import load_adapter
from grpo.run.checkpoint import load_checkpoint, newest_valid
from grpo.runtime.command import run_main
from grpo.runtime.env import load_keys
from grpo.runtime.messages import visible
from grpo.runtime.redaction import redacted
from grpo.tools.model_shape import tokenizer_and_shape
from grpo.tracking.console import Display
from grpo.tracking.model_card import model_card
from grpo.tracking.run_dir import choose_run_dir
from grpo.tracking.run_logger import RunLogger
from tests.fakes import tiny_data, tiny_folder
from tests.test_trainer import run

ROOT = Path(__file__).parent.parent


class Bomb:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def sources() -> list[Path]:
    return [path for folder in ("grpo", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_code_of_a_model_folder_is_not_run(tmp_path: Path) -> None:
    """X1. A model folder with its own code: an error that names the cause, and the code does not run."""
    folder, touched = tiny_folder(tmp_path / "model"), tmp_path / "touched"
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of", "auto_map": auto}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["modeling_x.XTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code = f"open({str(touched)!r}, 'w')\nclass XConfig: pass\nclass X: pass\nclass XTokenizer: pass\n"
    (folder / "modeling_x.py").write_text(code)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match=r"cannot be loaded"):
            load(str(folder))
    tiny_folder(tmp_path / "sound").joinpath("tokenizer.json").replace(folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / "sound" / name).exists():
            (tmp_path / "sound" / name).replace(folder / name)
    config = load_config([f"--model.name={folder}"])
    with pytest.raises(ConfigError, match=r"cannot be loaded"):  # the shape alone, as launch/check.py looks at it
        tokenizer_and_shape(config, [])
    assert not touched.exists()


def test_a_pickle_in_place_of_any_file_is_not_loaded(tmp_path: Path, record_property: Any) -> None:
    """X2. A pickle in place of each file of a checkpoint, and of a model's weights."""
    touched = tmp_path / "touched"
    bomb = pickle.dumps(Bomb(touched))
    run(tmp_path, "run", steps=1, eval_every=0)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(bomb)
        with pytest.raises(StorageError, match=re.escape(file.name)):
            load_checkpoint(checkpoint)
        assert newest_valid(tmp_path / "run")[0] is None
        file.write_bytes(whole)
    record_property("pickles planted", 2 + len(list(checkpoint.iterdir())))
    load_checkpoint(checkpoint)
    (checkpoint / "extra.pkl").write_bytes(bomb)  # what the manifest does not name is not looked at
    assert sorted(load_checkpoint(checkpoint)[0]) == ["model", "optimizer"]
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (transformers has several)
        load_model(str(tmp_path / "model"))
    assert not isinstance(caught.value, AssertionError)
    assert not touched.exists()
    pickle.loads(bomb)
    assert touched.exists()  # the bomb does work


def test_a_pickle_in_place_of_any_file_of_a_lora_run_is_not_loaded(tmp_path: Path, record_property: Any) -> None:
    """X2. Each file of its checkpoint, final/ and adapter/ in turn, and a pickled adapter beside them."""
    touched = tmp_path / "touched"
    bomb = pickle.dumps(Bomb(touched))
    run(tmp_path, "run", steps=1, eval_every=0, **{"lora.r": 2, "lora.target_modules": "[q_proj]"})
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-1"
    files = [file for part in (checkpoint, folder / "final", folder / "adapter") for file in sorted(part.iterdir())]
    assert {"optimizer.safetensors", "adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    for file in files:
        if not file.is_file():
            continue
        whole = file.read_bytes()
        file.write_bytes(bomb)
        load_everything(folder)
        file.write_bytes(whole)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    adapter.rename(tmp_path / "away.safetensors")
    (folder / "adapter" / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(
        ConfigError, match="holds no adapter_model.safetensors; adapter_model.bin, a pickle, is not read"
    ):
        load_adapter(load_model(str(tmp_path / "model")), folder / "adapter")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "custom_checkpoint_0.pkl", "pytorch_model.bin"):
        for part in (checkpoint, folder / "final", folder / "adapter"):
            (part / name).write_bytes(bomb)
    (tmp_path / "away.safetensors").rename(adapter)
    assert load_everything(folder) == 4
    assert not touched.exists()
    record_property("pickles planted", len([file for file in files if file.is_file()]) + 1 + 5 * 3)


def load_everything(folder: Path) -> int:
    """Load everything that commands load from a run. Return how many of four loads worked."""
    loads = [
        lambda: load_checkpoint(folder / "checkpoints" / "step-1"),
        lambda: load_model(str(folder / "final")),
        lambda: load_tokenizer(str(folder / "final")),
        lambda: load_adapter(load_model(str(folder.parent / "model")), folder / "adapter"),
    ]
    worked = 0
    for load in loads:
        try:
            load()
        except Exception as error:
            assert not isinstance(error, AssertionError)
        else:
            worked += 1
    return worked


@pytest.mark.parametrize(
    "banned",
    [
        r"(?<![.\w])(eval|exec)\(",
        r"\bpickle\.|\bimport pickle|weights_only=False|\btorch\.load\(|\bshelve\b|\bmarshal\b|\bjoblib\b",
        r"allow_pickle|\b(np|numpy)\.load\(|\bdill\b|cloudpickle|read_pickle|register_for_checkpointing|\.load_state\(\s*[\"']",
        r"trust_remote_code=True|shell=True|os\.system\(|yaml\.(unsafe_load|full_load|FullLoader|UnsafeLoader)",
        r"=\s*[\"']0\.0\.0\.0|share=True",
    ],
)
def test_what_no_source_file_may_hold(banned: str) -> None:
    """X1, X2, X3, X8, X11: no eval, no pickle, no remote code, no shell, nothing open to the network by itself."""
    assert [
        f"{path}: {line}" for path in sources() for line in path.read_text().splitlines() if re.search(banned, line)
    ] == []


def test_each_load_by_transformers_refuses_remote_code() -> None:
    """X1. Policy, reference, tokenizer and shape. An adapter has no code; its README shows PEFT."""
    texts = {path: path.read_text() for path in sources() if path.is_relative_to(ROOT / "grpo")}
    calls = [
        text[found.start() : found.start() + 500].split("\n    except", 1)[0]
        for text in texts.values()
        for found in re.finditer(r"Auto(?!Peft)\w+\.from_pretrained\(", text)
    ]
    assert len(calls) >= 3
    assert [call for call in calls if "trust_remote_code=False" not in call] == []


CANARIES = {
    "HF_TOKEN": "hf_CANARYaBcDeFgHiJkLmNoP",
    "WANDB_API_KEY": "c0ffee0canary0c0ffee0canary0c0ffee0canary",
    "MY_SERVICE_PASSWORD": "canary-correct-horse",
}


class RecordingWandb:
    """A tracker that keeps all its arguments."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def init(self, **arguments: Any) -> "RecordingWandb":
        self.given.append(arguments)
        return self

    def log(self, *arguments: Any, **named: Any) -> None:
        self.given.append((arguments, named))

    def finish(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.given.append((name, arguments, named))


def test_secrets_are_found_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """X7. Secrets in the environment and in .env: not in the run directory, not in W&B, not in the output."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    in_file = "canary-that-stands-in-the-file-only"
    monkeypatch.setenv("WANDB_OTHER_API_KEY", in_file)
    monkeypatch.delenv("WANDB_OTHER_API_KEY")
    (tmp_path / ".env").write_text(f"HF_TOKEN={CANARIES['HF_TOKEN']}2\nWANDB_OTHER_API_KEY={in_file}\n")
    load_keys()
    assert os.environ["WANDB_OTHER_API_KEY"] == in_file and os.environ["HF_TOKEN"] == CANARIES["HF_TOKEN"]
    canaries = CANARIES | {"WANDB_OTHER_API_KEY": in_file}
    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("grpo.run.checks.check_trackers", lambda names: None)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--data.path={CANARIES['HF_TOKEN']}", in_file])
    settings = {"steps": 2, "tracking.report_to": "[wandb, tensorboard]", "tracking.report": "true"}
    run(tmp_path, "run", **settings)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "environment.json", "config.yaml", "report.md"} <= {path.name for path in files}
    out, err = capfd.readouterr()
    everything = [(str(path), path.read_bytes()) for path in files]
    everything += [("output", (out + err).encode()), ("wandb", repr(wandb.given).encode())]
    everything += [("model card", str(model_card(tmp_path / "run")).encode())]
    assert [
        (where, name) for where, text in everything for name, value in canaries.items() if value.encode() in text
    ] == []
    assert len(wandb.given) >= 3
    record_property("secrets", len(canaries))
    record_property("files searched", len(files))


def test_an_error_does_not_tell_a_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)

    def fails(kind: type[Exception]) -> Any:
        def main() -> None:
            raise kind(f"401 for {' '.join(CANARIES.values())} at https://example.org")

        return main

    for kind in (GrpoError, RuntimeError):
        with pytest.raises(SystemExit):
            run_main(fails(kind))
    err = capsys.readouterr().err
    assert "401 for *** *** *** at https://example.org" in err
    assert not any(value in err for value in CANARIES.values())
    assert redacted("a plain sentence about tokens") == "a plain sentence about tokens"
    assert redacted("key hf_abcdefghijklmnopqrst.") == "key ***."


def test_secrets_are_not_settings(tmp_path: Path) -> None:
    """X7. Secrets are neither flags nor keys, and the error does not repeat the value."""
    (tmp_path / "a.yaml").write_text("hub_token: hf_CANARYaBcDeFgHiJkLmNoP\n")
    for arguments in (
        ["--hub_token", "CANARY123"],
        ["--tracking.api_key=CANARY123"],
        ["--config", str(tmp_path / "a.yaml")],
    ):
        with pytest.raises(ConfigError, match=r"\.env") as caught:
            load_config(arguments)
        assert "CANARY" not in str(caught.value)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored and not (ROOT / ".env").exists()


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[link=file:///etc/passwd]x[/link]",
    "\x1b[2J\x1b]52;c;aGVsbG8=\x07",
    "a\rb\x08\x9b31m",
    "\u202etxt.exe",
    "\ud800\x00",
    "=cmd|' /C calc'!A0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_hostile_text_is_shown_not_obeyed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """X9. Hostile text in the terminal is shown literally, control and direction marks as codes."""
    display = Display(3)
    display.completions([{"step": 1, "prompt": text, "completion": text, "reward": 1.0}])
    logging.getLogger("grpo").warning("%s", text)
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", out)
    assert visible(text).replace("\n", "") in out


def test_hostile_text_survives_the_files(tmp_path: Path) -> None:
    """X9, R16. Hostile text in the files is unchanged."""
    tracker = RunLogger(tmp_path, Config(tracking=TrackingConfig(report_to=[])), {}, 0)
    tracker.log(1, {}, [{"step": 1, "completion": text} for text in HOSTILE])
    tracker.finish()
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().split("\n")[:-1]]
    assert [row["completion"] for row in rows] == HOSTILE


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "..", ".", "a\0b", "CON", "n" * 300, "🦜", "-rf", "a/../../b", "~root", "$(touch x)", " "],
)
def test_run_names_stay_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """X10."""
    monkeypatch.chdir(tmp_path)
    config = Config(tracking=TrackingConfig(run_name=name))
    run_dir = choose_run_dir(config, datetime(2026, 1, 2))
    assert run_dir.parent == Path("outputs") and run_dir.resolve().parent == tmp_path / "outputs"
    assert not run_dir.name.startswith(("-", ".")) and "\0" not in run_dir.name
    run_dir.mkdir(parents=True)  # a name that the file system takes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: !!python/object/apply:os.system ['touch pwned']", "not valid YAML|could not determine a constructor"),
        ("steps: !!python/name:os.system", "YAML"),
        ("steps: 1\nsteps: 2", "given twice"),
        ("optimizer: {learning_rate: 1e-6, learning_rate: 1e-5}", "given twice"),
        ("stepss: 3", "did you mean 'steps'"),
        ("- 1\n- 2", "key: value"),
    ],
)
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    """X11."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", "a.yaml"])
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_yaml_numbers(tmp_path: Path) -> None:
    """X11. PyYAML alone reads 5e-6 as text."""
    (tmp_path / "a.yaml").write_text("optimizer: {learning_rate: 5e-6}\nobjective: {beta: 1E-2}\n")
    config = load_config(["--config", str(tmp_path / "a.yaml")])
    assert config.optimizer.learning_rate == 0.000005 and config.objective.beta == 0.01


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_columns_that_rewards_would_confuse(tmp_path: Path, name: str) -> None:
    """X12."""
    data = tiny_data(tmp_path / "data.jsonl")
    rows = [json.loads(line) | {name: 1} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config([f"--data.path={data}", "--model.name=x"])
    with pytest.raises(ConfigError, match=rf"data.jsonl:1: a column cannot be called '{name}'"):
        load_examples(config.data, "train", 0)


def pins(text: str) -> dict[str, str]:
    """Lines "name[extras]==version ..." -> {name: version}."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\#]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_holds_what_is_required_with_hashes() -> None:
    """X14. requirements.lock has every line of requirements.txt at its version, and a sha256 for every file of every
    package; nothing comes from an address.
    """
    text = (ROOT / "requirements.lock").read_text()
    wanted, locked = pins((ROOT / "requirements.txt").read_text()), pins(text)
    assert len(wanted) >= 17 and {name: locked.get(name) for name in wanted} == wanted
    assert len(locked) > 80 and {"huggingface-hub", "jinja2", "nvidia-nccl-cu13"} <= locked.keys()
    entries = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert len(entries) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE))
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+( ; [^\n]+)? \\\n    --hash=sha256:[0-9a-f]{64}\b", entry), entry[:80]
    assert not re.search(r"://|^-e|^--|file:", text, re.MULTILINE)
    # The command that makes it is its second line, and stands in SECURITY.md.
    assert text.splitlines()[1].removeprefix("#").strip() in (ROOT / "SECURITY.md").read_text()


def test_requirements_are_pinned() -> None:
    """X14. Exact versions of everything that the tests install; the wheel has ranges that contain these versions."""
    import tomllib
    from packaging.requirements import Requirement

    def read(name: str) -> list[Requirement]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        return [Requirement(line) for line in lines if line and not line.startswith("-")]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: list(map(Requirement, lines)) for name, lines in project["optional-dependencies"].items()}
    for_developers = [x for name in ("test", "benchmark", "browser", "notebook") for x in extras.pop(name)]
    required, optional = read("requirements.txt"), read(".ci/constraints.txt")
    pinned = {}
    for requirement in [*required, *optional, *for_developers]:
        (version,) = requirement.specifier
        assert version.operator == "==", requirement
        assert pinned.setdefault(requirement.name, version.version) == version.version, requirement
    dependencies = list(map(Requirement, project["dependencies"]))
    assert {x.name for x in dependencies} == {x.name for x in required}
    ranges = dependencies + [x for lines in extras.values() for x in lines]
    assert len(ranges) > 20
    for requirement in ranges:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
        assert {x.operator for x in requirement.specifier} == {">=", "<"}, requirement
