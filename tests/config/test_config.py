import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config.help import COMMON, help_text, sections_of
from grpo.config.parser import load_config
from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling.num_generation", "3"], "did you mean 'sampling.num_generations'"),
        (["--num_generations=3"], "did you mean 'sampling.num_generations'"),
        (["--nonsense.key", "1"], "unknown flag --nonsense.key"),
        (["--sampling.num_generations", "1"], "needs at least 2"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "steps is 0"),
        (["--sampling.temperature", "0"], "temperature"),
        (["--sampling.top_p", "0.9"], "top_p"),
        (["--objective.kl_estimator", "k9"], "kl_estimator"),
        (["--rewards", "{}"], "rewards is empty"),
        (["--tokens_per_batch", "10"], "tokens_per_batch is 10"),
        (["--tracking.report_to", "[mlflow]"], "mlflow"),
        (["--model.attn_implementation", "sdpa"], "set rollout.engine to transformers"),
        (["--config", "missing.yaml"], "there is no file missing.yaml"),
    ],
)
def test_errors_say_what_and_how_to_mend(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", "\\(").replace(".", "\\.")):
        load_config(["--model.name", "m", *flags])


def test_files_are_read_left_to_right_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 5\noptimizer:\n  learning_rate: 5e-6\nrewards: {int: 1}\n")
    (tmp_path / "b.yaml").write_text("steps: 7\n")
    config = load_config(
        ["--model.name=m", "--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--seed", "3"]
    )
    assert (config.steps, config.seed, config.optimizer.learning_rate) == (7, 3, 5e-6)
    assert config.rewards == {"int": 1.0}


def test_bad_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for content, message in [
        ("steps: 5\nsteps: 6\n", "given twice"),
        ("optimiser:\n  learning_rate: 1\n", "did you mean 'optimizer.learning_rate'"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("- 1\n", "key: value"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_config(["--model.name=m", "--config", str(path)])


def test_the_command_exits_2_with_the_message_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, LAUNCH / "train.py", "--optimizer.lerning_rate", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: unknown flag --optimizer.lerning_rate (value '1'): did you mean 'optimizer.learning_rate'?\n"
    )


def test_help_is_short_and_holds_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    keys = flatten(to_dict(Config()))
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"])
    short = capsys.readouterr().out
    assert ended.value.code == 0 and len(short.splitlines()) < 100 and max(map(len, short.splitlines())) <= 120
    for key in keys:
        assert f"--{key} " in short or re.search(rf"\b{key.rpartition('.')[2]}\b", short), key
    assert "--sampling.num_generations 8" in short and "G: completions per prompt" in short
    with pytest.raises(SystemExit):
        load_config(["--help", "all"])
    full = capsys.readouterr().out
    assert all(f"--{key} " in full for key in keys)
    assert "--lora.r null" in help_text(Config, "lora") and "--steps" not in help_text(Config, "lora")
    assert "There is no section 'lorra'." in help_text(Config, "lorra")


def test_the_keys_that_help_shows_are_there() -> None:
    sections = sections_of(Config)
    for name, common in COMMON.items():
        assert set(common.split()) <= {key.flag.rpartition(".")[2] for key in sections[name]}, name


def test_help_into_a_pipe_that_closes_early_is_no_error() -> None:
    program = "from grpo.config.parser import load_config; load_config(['--help', 'all'])"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "run\n"
