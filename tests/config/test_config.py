import dataclasses
import math
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
from grpo.config.validation import check_config
from grpo.config.values import has_type
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
        (["--evaluation.top_p", "0.9"], "evaluation.top_p is 0.9, but evaluation.temperature is 0"),
        (["--objective.mini_batches", "999"], "mini_batches is 999, but a step has only"),
        (["--objective.top_entropy_quantile", "0.2", "--objective.entropy_coef", "0.1"], "top_entropy_quantile is 0.2"),
        (["--objective.scale_rewards", "std"], "scale_rewards"),
        (["--rewards", "{}"], "rewards is empty"),
        (["--load_best_model_at_end", "true", "--eval_every", "0"], "there is no evaluation to choose by"),
        (["--tokens_per_batch", "10"], "tokens_per_batch is 10"),
        (["--optimizer.adam_beta1", "1"], "optimizer.adam_beta1 is 1.0, needs at least 0 and below 1"),
        (["--optimizer.max_grad_norm", "-1"], "optimizer.max_grad_norm is -1.0, needs at least 0"),
        (["--optimizer.learning_rate", ".nan"], "optimizer.learning_rate is nan, needs at least 0"),
        (["--optimizer.learning_rate", ".inf"], "optimizer.learning_rate is inf, needs at least 0"),
        (["--data.eval_size", "-5"], "data.eval_size is -5, needs at least 1"),
        (["--seed", "-1"], "seed is -1, needs to be between 0 and"),
        (["--rewards.accuracy", ".nan"], "rewards.accuracy is nan"),
        (["--rewards.accuracy", "null"], "rewards.accuracy is null, needs a number"),
        (["--lora.r", "sixteen"], "lora.r is 'sixteen', needs a whole number or null"),
        (["--steps", "1e3"], "steps is 1000.0, needs a whole number"),
        (["--steps", "010"], "steps is '010', needs a whole number"),
        (["--seed", "#1"], "seed is '#1', needs a whole number"),
        (["--data.one_shot", "1"], "data.one_shot is 1, needs true or false"),
        (["--run_dir", ""], "run_dir is '', needs text or null that is not empty"),
        (["--run_dir", "None"], "run_dir is 'None', needs text or null: write null for no value"),
        (["--tracking.report_to", "none"], "needs a list of names: [NAME, NAME]: write [] for none"),
        (["--rewards", "[1]"], "rewards is [1], needs a mapping of names to numbers: {NAME: 1.0}"),
        (["--rewards", "{accuracy"], "--rewards is '{accuracy', not valid YAML"),
        (["--reward_kwargs", "accuracy"], "needs a mapping of names to mappings: {NAME: {ARGUMENT: VALUE}}"),
        (["--model", "x"], "--model is a section: set its keys, for example --model.name VALUE"),
        (["--steps", "3", "4"], "'4' is not a flag"),
        (["--config", "missing.yaml"], "there is no file missing.yaml"),
    ],
)
def test_errors_say_what_and_how_to_mend(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(["--model.name", "m", *flags])


def test_every_number_refuses_what_is_no_number_of_its_range() -> None:
    """NaN, and the nearest values outside each declared range, whatever the key."""
    for name, key in keys_of(Config).items():
        interval = key.setting.range
        if interval is None:
            continue
        low, high = interval.ends
        outside = [math.nan, *([low - 1] if low > -math.inf else [-math.inf]), *([high + 1] if high < math.inf else [])]
        outside += [low] * (interval.text[0] == "(") + [high] * (interval.text[-1] == ")")
        for value in outside:
            with pytest.raises(ConfigError, match=re.escape(f"{name} is {value}")):
                key.check(value)


def test_files_are_read_left_to_right_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 5\noptimizer:\n  learning_rate: 5e-6\nrewards: {int: 1}\n")
    (tmp_path / "b.yaml").write_text("steps: 7\n")
    config = load_config(
        ["--model.name=m", "--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--seed", "3"]
    )
    assert (config.steps, config.seed, config.optimizer.learning_rate) == (7, 3, 5e-6)
    assert config.rewards == {"int": 1.0}


LITERAL = ["# You are careful", "#", "a # b", "a: b", "[a", "{a}", "- a", "&a b", "*a", "!a", "true", "007", "1e5"]
LITERAL += ["2024-01-01", "1:30", "'quoted'", "a\nb", " a", "%", "--- a", "-1"]


@pytest.mark.parametrize("text", LITERAL)
def test_the_text_of_a_flag_is_taken_literally(text: str) -> None:
    config = load_config(["--model.name=m", "--data.system_prompt", text, f"--tracking.run_name={text}"])
    assert (config.data.system_prompt, config.tracking.run_name) == (text, text)


def test_null_is_judged_alike_in_files_and_flags(tmp_path: Path) -> None:
    """Every key: where the type allows no null, it is refused by name; where it does, it is taken."""
    refused = 0
    for name, key in keys_of(Config).items():
        if name == "model.name" or has_type(None, key.type):
            continue
        (tmp_path / "a.yaml").write_text(f"{name}: null\n")
        found = set()
        for argv in ([f"--config={tmp_path / 'a.yaml'}"], [f"--{name}", "null"], [f"--{name}=~"]):
            with pytest.raises(ConfigError) as caught:
                load_config(["--model.name=m", *argv])
            found.add(str(caught.value))
        [message] = found
        assert message.startswith(f"{name} is null, needs "), message
        refused += 1
    assert refused >= 75
    for word in ("null", "~", "Null"):
        config = load_config(["--model.name=m", "--data.system_prompt", word, f"--lora.r={word}"])
        assert config.data.system_prompt is None and config.lora.r is None
    (tmp_path / "a.yaml").write_text("data:\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"a.yaml: data is null, but it is a section: write keys such as name below"):
        load_config([f"--config={tmp_path / 'a.yaml'}"])


def test_values_of_other_types_are_refused_in_files_and_in_python(tmp_path: Path) -> None:
    for line, message in [
        ("tracking.run_name: 2024", "tracking.run_name is 2024, needs text or null: put it into quotes"),
        ("data.system_prompt: no", "data.system_prompt is false, needs text or null: put it into quotes"),
        ("data.system_prompt: None", "write null for no value"),
        ("steps: 5.0", "steps is 5.0, needs a whole number"),
        ("steps: true", "steps is true, needs a whole number"),
        ("steps: 1:30", "steps is '1:30', needs a whole number"),
        ("data.one_shot: 1", "data.one_shot is 1, needs true or false"),
        ("callbacks: [a, 1]", "callbacks is ['a', 1], needs a list of names"),
        ("reward_kwargs: {accuracy: 3}", "reward_kwargs.accuracy is 3, needs a mapping"),
        ("rewards: {accuracy: yes}", "rewards.accuracy is true, needs a number"),
    ]:
        (tmp_path / "a.yaml").write_text(line + "\n")
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(["--model.name=m", f"--config={tmp_path / 'a.yaml'}"])
    for config in (Config(steps=None), Config(seed=1.5), Config(callbacks=None)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="needs a"):
            check_config(config)


def test_bare_names_make_lists_and_mappings(tmp_path: Path) -> None:
    flags = ["--tracking.report_to", "wandb", "--rewards", "accuracy,int", "--lora.target_modules", "q_proj", "v_proj"]
    config = load_config(["--model.name=m", *flags])
    assert config.tracking.report_to == ["wandb"] and config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.rewards == {"accuracy": 1.0, "int": 1.0}
    (tmp_path / "a.yaml").write_text(
        "tracking.report_to: wandb, trackio\nrewards: [accuracy, my.py:f]\ncallbacks: a.py:C\n"
    )
    config = load_config(["--model.name=m", f"--config={tmp_path / 'a.yaml'}", "--tracking.report_to+=tensorboard"])
    assert config.tracking.report_to == ["wandb", "trackio", "tensorboard"]
    assert config.rewards == {"accuracy": 1.0, "my.py:f": 1.0} and config.callbacks == ["a.py:C"]


def test_rows_or_a_file_of_rows(tmp_path: Path) -> None:
    """data.examples: a list of rows in brackets, or the name of a file, in flags and in YAML."""
    read = lambda text: load_config(["--model.name=m", f"--data.examples={text}"]).data.examples  # noqa: E731
    assert read("[{question: a, answer: '#### 1'}]") == [{"question": "a", "answer": "#### 1"}]
    assert (read("rows.jsonl"), read("null")) == ("rows.jsonl", None)
    (tmp_path / "my.yaml").write_text("data: {examples: [{question: a, answer: 2}]}")
    assert load_config(["--model.name=m", f"--config={tmp_path}/my.yaml"]).data.examples == [
        {"question": "a", "answer": 2}
    ]
    with pytest.raises(ConfigError, match=r"needs a list of rows: \[\{COLUMN: VALUE\}\] or text or null"):
        read("[a, b]")


def test_one_entry_of_a_mapping_is_set_by_a_flag() -> None:
    words = ["--rewards.my.py:f", "0.5", "--reward_kwargs.my.py:f.limit", "4", "--reward_kwargs.my.py:f.note=# a"]
    config = load_config(["--model.name=m", *words, "--objective.loss_kwargs.tau", "0.7"])
    assert config.rewards == {"accuracy": 1.0, "xml_format": 0.2, "my.py:f": 0.5}
    assert config.reward_kwargs == {"my.py:f": {"limit": 4, "note": "# a"}} and config.objective.loss_kwargs == {
        "tau": 0.7
    }


def test_home_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = load_config(["--model.name=~/m", "--run_dir=~/run", "--resume=~/run", "--data.eval_path=~/a.jsonl"])
    assert (config.model.name, config.run_dir, config.resume) == ("/home/ann/m", "/home/ann/run", "/home/ann/run")
    assert config.data.eval_path == "/home/ann/a.jsonl"
    assert load_config(["--model.name=m", "--data.system_prompt=~ a"]).data.system_prompt == "~ a"


def test_a_path_replaces_the_generated_problems_of_the_tiny_model(tmp_path: Path) -> None:
    assert load_config([]).data.name == "arithmetic"
    assert load_config(["--data.path=mine.jsonl"]).data.name == "question_answer"
    (tmp_path / "a.yaml").write_text("data: {path: mine.jsonl}\n")
    assert load_config([f"--config={tmp_path / 'a.yaml'}"]).data.name == "question_answer"
    for flags, message in [
        (["--data.name=arithmetic", "--data.path=a.jsonl"], "data.path is a.jsonl, but dataset 'arithmetic' generates"),
        (["--data.eval_path=a.jsonl"], "data.eval_path is a.jsonl, but dataset 'arithmetic' generates its rows"),
        (["--data.name=invented_language", "--data.split=test"], "data.split is test, but"),
        ([f"--data.path={__file__}", "--data.split=test"], "data.split is test, but data.path is a file"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_components(load_config(flags))


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
    assert ended.value.code == 0 and len(short.splitlines()) < 110 and max(map(len, short.splitlines())) <= 120
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
