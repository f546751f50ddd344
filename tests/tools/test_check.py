"""Check: findings without weights, and scores of completions from a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from grpo.config.parser import load_config
from grpo.data.duplicates import count_repeats
from grpo.data.rows import load_examples
from grpo.errors import ConfigError
from grpo.rewards.scoring import RewardSum
from grpo.tools import check_config, check_rewards
from grpo.tools.check_config import check
from grpo.tools.check_cost import describe_batch
from grpo.tools.check_examples import check_examples
from grpo.tools.check_result import Check
from grpo.tools.model_shape import tokenizer_and_shape
from grpo.tools.score_completions import score_rows
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    (tmp_path / "model" / "model.safetensors").unlink()  # a dry run reads no weight
    return [
        f"--model.name={tmp_path / 'model'}",
        f"--data.path={tmp_path / 'data.jsonl'}",
        f"--run_dir={tmp_path / 'run'}",
        "--data.system_prompt=null",
        "--tracking.report_to=[]",
        "--data.max_prompt_length=32",
    ]


def test_what_a_sound_config_shows(flags: list[str], tmp_path: Path) -> None:
    found = check(load_config(flags))
    assert (found.rows, found.with_answer, found.duplicates, found.overlap) == (12, 12, 0, 0)
    assert found.lengths == {"shortest": 4, "median": 4, "95 %": 6, "max": 6}  # "0+1=" and "10+11="; one token a letter
    assert [prompt.answer for prompt in found.prompts] == ["1", "3"]
    assert found.form == "xml"
    assert found.rewards["accuracy"].scores == {"gold": 1.0, "wrong": 0.0, "empty": 0.0, "hostile": 0.0}
    assert found.rewards["xml_format"].scores == {"gold": 1.0, "wrong": 1.0, "empty": 0.0, "hostile": 1.0}
    assert found.problems == [] and found.warnings == []
    assert not (tmp_path / "run").exists()


PROSE = [("water", "t\u00e2ga"), ("fire", "n\u00eege"), ("tree", "mura")]


@pytest.mark.parametrize("terms", [PROSE, PROSE[:1] * 3], ids=["different", "one answer"])
def test_a_wrong_probe_does_not_hold_the_right_answer(tmp_path: Path, terms: list[tuple[str, str]]) -> None:
    """The wrong answer of prose is another row's whole text, or the own one with the gold term edited."""
    tiny_folder(tmp_path / "model")
    lines = [
        {
            "question": f"how does one say {word} {row}?",
            "answer": f"We call {word} `{term}`, as I heard.",
        }
        for row, (word, term) in enumerate(terms)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [
        f"--model.name={tmp_path / 'model'}",
        f"--data.path={tmp_path / 'data.jsonl'}",
        "--data.system_prompt=null",
    ]
    rewards = "--rewards={term_match: 0.6, chrf: 0.4, length_guard: 0.1}"
    found = check(load_config([*flags, rewards, "--data.extractor=quoted_terms", "--tracking.report_to=[]"]))
    assert found.problems == [] and found.form == "the whole answer column"
    assert found.rewards["term_match"].scores["gold"] == 1.0 and found.rewards["term_match"].scores["wrong"] == 0.0
    assert found.rewards["chrf"].scores["gold"] == 1.0 > found.rewards["chrf"].scores["wrong"]


def test_a_reward_that_is_1_in_all_four_columns_is_not_fine(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def no_box(completions, **_):\n    return [float('boxed' not in c[0]['content']) for c in completions]\n"
    )
    found = check(load_config([*flags, f"--rewards={{accuracy: 1.0, {tmp_path}/mine.py:no_box: 0.1}}"]))
    result = found.rewards[f"{tmp_path}/mine.py:no_box"]
    assert set(result.scores.values()) == {1.0}
    assert result.problem is not None and result.problem.startswith("blind: 1.0 for gold, wrong, empty and hostile")
    assert found.warnings == [f"reward '{tmp_path}/mine.py:no_box' is {result.problem}"] and found.problems == []


def test_two_rows_of_data_are_reported(flags: list[str], tmp_path: Path) -> None:
    tiny_data(tmp_path / "data.jsonl", rows=2)
    [warning] = check(load_config(flags)).warnings
    assert warning.startswith("the data has only 2 training prompts")


def test_worked_examples_are_in_the_prompts_that_are_shown(flags: list[str]) -> None:
    found = check(load_config([*flags, "--data.examples=[{question: what, completion: this}]"]))
    assert found.prompts[0].text.replace("\n", "").startswith("whatthis0+1=")
    assert found.lengths["shortest"] > 4


HASHED = "[{question: 2+2, answer: '2 and 2 are 4 #### 4'}, {question: 3+3, answer: '3 and 3 are 6 #### 6'}]"
TAGGED = "[{question: 2+2, completion: '<reasoning>\\n2+2\\n</reasoning>\\n<answer>\\n4\\n</answer>\\n'}]"


def warnings_about_examples(flags: list[str], *more: str) -> list[str]:
    config = load_config([*flags, "--data.max_prompt_length=null", *more])
    score, found = RewardSum(config.rewards, config.reward_kwargs), Check()
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    check_rewards.check_rewards(found, score, load_examples(config.data, "train", 0)[:4], tokenizer)
    found.warnings.clear()
    check_examples(found, score, config.data, tokenizer)
    return found.warnings


@pytest.mark.parametrize("prompt", ["null", "Work it out."])
def test_examples_in_a_form_that_is_not_paid_are_named(flags: list[str], prompt: str) -> None:
    own = [*flags, f"--data.system_prompt={prompt}"]
    [warning] = warnings_about_examples(own, f"--data.examples={HASHED}", '--rewards={"accuracy": 1.0}')
    assert warning == (
        "data.examples, row 1, data.examples, row 2: the answer that the prompt shows earns no more than an empty one. "
        "'accuracy' does not read the form of the worked examples: it pays 0.000 for them, 1.000 in the form 'xml'. "
        "Set --data.system_prompt xml, which shows them in <reasoning> and <answer> tags, or write them so in a column "
        "'completion'"
    )
    [warning] = warnings_about_examples(own, "--data.one_shot=true")
    assert warning.startswith("data.one_shot: the answer that the prompt shows earns no more than an empty one")
    assert warnings_about_examples(own, f"--data.examples={TAGGED}") == []
    wrong = TAGGED.replace("completion:", "answer: '#### 5', completion:")  # shows 4, and the gold answer is 5
    [warning] = warnings_about_examples(own, f"--data.examples={wrong}", '--rewards={"accuracy": 1.0}')
    assert "'accuracy' does not read" in warning
    assert warnings_about_examples(own, "--data.examples=[{question: what, completion: no answer}]") == []


def test_a_reward_that_does_not_read_the_examples_is_named_where_another_one_pays_them(flags: list[str]) -> None:
    paid = '--rewards={"accuracy": 1.0, "tests.compat.rewards:by_length": 0.5}'
    [warning] = warnings_about_examples(flags, f"--data.examples={HASHED}", paid)
    assert warning.startswith("'accuracy' does not read the form of the worked examples: it pays 0.000")


def test_examples_in_the_form_that_is_paid_are_fine(flags: list[str], tmp_path: Path) -> None:
    tagged = [flag for flag in flags if "system_prompt" not in flag]
    path = tmp_path / "examples.jsonl"
    path.write_text('{"question": "2+2", "answer": "2 and 2 are 4 #### 4"}\n')
    for more in (f"--data.examples={HASHED}", "--data.one_shot=true", f"--data.examples={path}"):
        assert warnings_about_examples(tagged, more) == []


def test_a_check_looks_at_the_examples(flags: list[str]) -> None:
    found = check(load_config([*flags, "--data.examples=[{question: '2', answer: '#### 2'}]"]))
    assert any(line.startswith("data.examples, row 1: the answer that the prompt shows") for line in found.warnings)


def test_a_dead_reward_is_named_and_one_that_pays_wrong_answers_is_named(flags: list[str]) -> None:
    found = check(load_config([*flags, '--rewards={"accuracy": 1.0, "soft_format": 0.5}']))
    assert found.rewards["soft_format"].problem == (
        "constant: 0.0 for gold, wrong, empty and hostile answers alike, so it teaches nothing"
    )
    assert found.problems == []
    found = check(load_config([*flags, '--rewards={"xml_format": 1.0}']))
    assert found.warnings[0].startswith("a right answer earns 1.000, a wrong one 1.000") and found.problems == []


@pytest.mark.parametrize(
    ("body", "problem", "ends"),
    [
        ("__import__('time').sleep(60)", "too slow: not done after 1 s", False),
        ("1 / 0", "broken on the gold xml completions", True),
        ("return [1 / len(c[0]['content']) for c in completions]", "broken on the empty completions", False),
        ("__import__('os')._exit(1)", "broken: its process died", True),
    ],
)
def test_a_reward_that_hangs_raises_or_dies(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str, ends: bool
) -> None:
    """What would end training as well is a problem; what training masks or waits for is a warning."""
    monkeypatch.setattr(check_rewards, "DEADLINE", 1.0)
    (tmp_path / "mine.py").write_text(f"def bad(completions, **columns):\n    {body}\n")
    found = check(load_config([*flags, f'--rewards={{"accuracy": 1.0, "{tmp_path}/mine.py:bad": 1.0}}']))
    assert problem in (found.problems if ends else found.warnings)[0] and bool(found.problems) == ends


def test_held_out_questions_among_the_training_rows(flags: list[str], tmp_path: Path) -> None:
    """A warning, as in `train`, from the same function."""
    config = load_config([*flags, f"--data.eval_path={tmp_path / 'data.jsonl'}"])
    found = check(config)
    rows = load_examples(config.data, "train", config.seed)
    assert found.overlap == 12 and found.problems == []
    assert found.warnings == count_repeats(rows, rows).warnings()
    assert found.warnings[0].startswith("12 of 12 held-out questions are among the training prompts")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--callbacks=[no_such.py:Digits]", "no_such.py"),
        ("--resume=no/such/run", "resume: there is no folder no/such/run"),
        ("--tracking.report_to=[no_such]", "no_such"),
    ],
)
def test_what_train_refuses_is_refused(flags: list[str], flag: str, message: str) -> None:
    """Before weights load: both commands call the same checks."""
    config = load_config([*flags, flag])
    for command in (check, train):
        with pytest.raises(ConfigError, match=message):
            command(config)


def test_the_reference_is_looked_at(flags: list[str], tmp_path: Path) -> None:
    other = tiny_model(vocab_size=50)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="a vocabulary of 50, the policy one of 42"):
        check(load_config([*flags, f"--model.reference={tmp_path / 'other'}"]))
    with pytest.raises(ConfigError, match="model.reference '.*none' cannot be loaded"):
        check(load_config([*flags, f"--model.reference={tmp_path / 'none'}"]))


def test_bad_rows_streams_and_permission_are_looked_at_as_train_does(flags: list[str], tmp_path: Path) -> None:
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"question": "no mark", "answer": "5"}\n')
    found = check(load_config([*flags, "--data.bad_rows=skip"]))
    assert found.data == (
        "data: 13 rows, 12 used, 1 left out (rejected.jsonl); extractor hash found 12 of 13 answers (92.3%), the "
        "first is '1'"
    )
    assert found.rejected[0]["place"] == f"{tmp_path / 'data.jsonl'}:13"
    (tmp_path / "data_card.yaml").write_text("source: here\nlicence: mit\npermission: unknown\n")
    streamed = check(load_config([*flags, "--data.bad_rows=skip", "--data.streaming=true"]))
    assert "only the first 12 rows were read" in streamed.data and "epochs" not in streamed.batch
    assert streamed.warnings == [
        f"data card {tmp_path / 'data_card.yaml'}: permission is unknown. Ask before you publish a model that was "
        "trained on it"
    ]
    (tmp_path / "data_card.yaml").write_text("source: here\nlicence: mit\npermission: prohibited\n")
    with pytest.raises(ConfigError, match="permission is prohibited"):
        check(load_config(flags))


def test_large_files_are_measured_at_even_distances(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_config, "MEASURED_ROWS", 5)
    found = check(load_config([*flags, "--data.max_prompt_length=4", "--num_train_epochs=3"]))
    # every third of 12 rows: "0+1=", "3+4=", "6+7=", "9+10="; the last has 5 tokens, so a quarter of 12 is left out
    assert (found.measured, found.too_long) == (4, 1)
    assert found.warnings[0] == "1 of the 4 measured prompts are longer than data.max_prompt_length 4: left out"
    assert found.steps == 4  # 3 epochs of 9 prompts, 8 a step


def test_the_arithmetic_by_hand(flags: list[str]) -> None:
    config = load_config([*flags, "--steps=6", "--prompts_per_step=4", "--sampling.max_completion_length=10"])
    assert describe_batch(config, 12) == (
        "4 prompts x 8 completions = 32 completions per step, at most 320 tokens; 1 optimizer step on them, in batches "
        "of up to 8,192 tokens; 6 steps = 24 prompts = 2.00 epochs of 12; totals over all processes"
    )
    model = tokenizer_and_shape(config, load_examples(config.data, "train", 0))[1]
    assert all(parameter.is_meta for parameter in model.parameters())
    size = sum(parameter.numel() for parameter in model.parameters())
    found = check(config)
    assert found.memory["AdamW"] * 2**30 == 8 * size
    assert found.memory["peak"] > found.memory["weights"] + found.memory["gradients"] + found.memory["AdamW"]


def test_scores_of_a_file(tmp_path: Path) -> None:
    right = "<reasoning>\nx\n</reasoning>\n<answer>\n1,080\n</answer>\n"
    rows = [
        {"prompt": "q", "completion": right, "answer": "1080", "pair_id": 7},
        {"prompt": [{"role": "user", "content": "q"}], "completion": "no", "answer": "3"},
        {"prompt": "q", "completion": [{"role": "assistant", "content": right}], "answer": None},
        {"step": 1, "draw": 2, "sample": 0, "prompt": "q", "completion": right, "columns": {"answer": "1080"}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "launch/check.py", "--completions", tmp_path / "in.jsonl"]
    subprocess.run([*command, "--output", tmp_path / "out.jsonl"], cwd=ROOT, check=True, capture_output=True)
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["rewards"] for row in scored] == [
        {"accuracy": 1.0, "xml_format": 1.0},
        {"accuracy": 0.0, "xml_format": 0.0},
        {"accuracy": None, "xml_format": 1.0},
        {"accuracy": 1.0, "xml_format": 1.0},
    ]
    assert [row["reward"] for row in scored] == pytest.approx([1.2, 0.0, 0.2, 1.2])
    assert scored[0]["pair_id"] == 7
    with pytest.raises(ConfigError, match="row 1: needs 'prompt' and 'completion'"):
        score_rows(load_config([]), [{"prompt": "x"}])


@pytest.mark.slow
def test_the_command_on_the_starter_and_on_a_broken_config(tmp_path: Path) -> None:
    command = [sys.executable, "launch/check.py", f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 prompts x 16 completions = 128 completions per step" in done.stdout and "ready to train" in done.stdout
    done = subprocess.run([*command, '--rewards={"xml_format": 1}'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "warning: a right answer earns" in done.stdout
    done = subprocess.run([*command, "--data.answer=gold"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "gold" in done.stdout + done.stderr
