import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config import load_config
from grpo.errors import ConfigError

LAUNCH = Path(__file__).parent.parent / "launch"


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
