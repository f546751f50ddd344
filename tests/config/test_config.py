import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config.help import config_page, help_text, sections_of
from grpo.config.parser import load_config
from grpo.config.schema import Config, flatten, to_dict
from grpo.config.setting import Interval, keys_of, setting
from grpo.errors import ConfigError
from grpo.run.components import check_components

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
        (["--objective.scale_rewards", "std"], "scale_rewards"),
        (["--rewards", "{}"], "rewards is empty"),
        (["--tokens_per_batch", "10"], "tokens_per_batch is 10"),
        (["--optimizer.adam_beta1", "1"], "optimizer.adam_beta1 is 1.0, needs at least 0 and below 1"),
        (["--optimizer.max_grad_norm", "-1"], "optimizer.max_grad_norm is -1.0, needs to be above 0"),
        (["--optimizer.learning_rate", ".nan"], "optimizer.learning_rate is nan, needs at least 0"),
        (["--optimizer.learning_rate", ".inf"], "optimizer.learning_rate is inf, needs at least 0"),
        (["--data.eval_size", "-5"], "data.eval_size is -5, needs at least 1"),
        (["--seed", "-1"], "seed is -1, needs to be between 0 and"),
        (["--rewards.accuracy", ".nan"], "rewards.accuracy is nan"),
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


def test_components_check_what_they_need_of_the_config() -> None:
    for flags, message in [
        (["--model.attn_implementation=sdpa"], "set rollout.engine to transformers"),
        (["--objective.kl_estimator=k9"], "objective.kl_estimator: unknown KL estimator 'k9'"),
        (["--rollout.engine=vllm", "--rollout.max_staleness=1"], "rollout.max_staleness is 1"),
        (["--rollout.engine_kwargs={depth: 2}"], "rollout.engine_kwargs has 'depth', which is no argument of"),
        (["--rollout.engine=grpo.types:Group"], "is not a subclass of"),
        (["--objective.loss_type=cispo", "--objective.epsilon_high=0.5"], "a cap below 1 scales every gradient down"),
        (["--objective.loss_type=gspo", "--objective.importance_sampling_level=token"], "use loss_type grpo"),
        (["--objective.delta=1.1"], "needs to be above 1 + epsilon_high = 1.2"),
        (["--objective.subset_size=2"], "objective.subset is not"),
        (
            ["--objective.advantage_estimator=rloo", "--objective.multi_objective_aggregation=normalize_then_sum"],
            "set objective.advantage_estimator to gdpo",
        ),
    ]:
        config = load_config(["--model.name=m", *flags])
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_components(config)
    check_components(load_config(["--model.name=m", "--objective.loss_type=gfpo", "--objective.subset_size=2"]))


def test_every_key_declares_what_the_rest_reads() -> None:
    for name, key in keys_of(Config).items():
        assert key.text, f"{name} has no text"
        numeric = re.search(r"\b(int|float)\b", str(key.type)) and not str(key.type).startswith("dict")
        assert bool(numeric) == (key.setting.range is not None), f"{name}: a number needs a range"
        key.check(key.default)
    assert list(keys_of(Config)) == list(flatten(to_dict(Config())))


def test_no_name_of_a_component_stands_in_the_checks() -> None:
    source = "".join((LAUNCH.parent / "grpo" / "config" / f"{name}.py").read_text() for name in ("validation", "help"))
    for name in ("gspo", "cispo", "gfpo", "gdpo", "rloo", "vllm", "native"):
        assert name not in source, name


def test_intervals() -> None:
    for text, inside, outside, words in [
        ("[1, inf)", [1, 1e300], [0, float("inf"), float("nan")], "at least 1"),
        ("[1, inf]", [1, float("inf")], [0.5, float("nan")], "at least 1"),
        ("(0, 1]", [0.1, 1], [0, 1.1], "above 0 and at most 1"),
        ("[0, 1]", [0, 1], [-0.1, 1.1], "between 0 and 1"),
        ("(-inf, inf)", [-5, 0], [float("-inf"), float("inf"), float("nan")], "finite"),
    ]:
        interval = Interval(text)
        assert all(map(interval.holds, inside)) and not any(map(interval.holds, outside)) and str(interval) == words


@dataclasses.dataclass
class Settings:
    depth: int = setting(3, "[1, inf)", resume="free", common=True)
    """Depth of the search."""


def test_a_new_key_is_one_field() -> None:
    assert keys_of(Settings)["depth"].setting.resume == "free"
    shown = help_text(Settings)
    assert "--depth 3" in shown and "Depth of the search" in shown


def test_the_page_of_keys_is_made_from_the_schema() -> None:
    page = LAUNCH.parent / "docs" / "config.md"
    assert page.read_text() == config_page(Config) + "\n"
    assert set(sections_of(Config)) == {key.section for key in keys_of(Config).values()}


def test_names_of_trl_are_its_own() -> None:
    trl = pytest.importorskip("trl", reason="pip install trl")
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments  # noqa: F401

    theirs = {
        field.name for kind in (trl.GRPOConfig, trl.ModelConfig, ScriptArguments) for field in dataclasses.fields(kind)
    }
    named = {key.setting.trl for key in keys_of(Config).values()} - {None, "reward_funcs"}  # reward_funcs: an argument
    assert named <= theirs, named - theirs


def test_help_into_a_pipe_that_closes_early_is_no_error() -> None:
    program = "from grpo.config.parser import load_config; load_config(['--help', 'all'])"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "run\n"


def test_the_table_for_users_of_trl_has_the_names_of_the_schema() -> None:
    keys, compared = keys_of(Config), 0
    table = (LAUNCH.parent / "README.md").read_text().partition("## Coming from TRL")[2].partition("\n## ")[0]
    for here, theirs in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)[^`]*`", here):
            trl = keys[name].setting.trl if name in keys else None
            if trl is not None and theirs != "the same":
                assert re.search(rf"`{trl}\b", theirs), f"{name} is {trl} in TRL"
                compared += 1
    assert compared >= 10
