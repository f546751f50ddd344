"""Rewards: values by hand, agreement with the regular expressions, hostile text, and errors that name the place."""

import itertools
import math
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from grpo.errors import ConfigError, RewardError
from grpo.rewards.calls import call_reward
from grpo.rewards.number_text import last_number, parse_number
from grpo.rewards.registry import REWARDS, reward_labels
from grpo.rewards.scoring import RewardSum
from grpo.rewards.worker_process import address_of
from grpo.rewards.xml_format import lenient_answer
from grpo.rollout.evaluation import is_correct_in_any_format
from grpo.run.resume import check_changes
from grpo.types import Completion, Group, Prompt

GOOD = "<reasoning>\n2 + 2\n</reasoning>\n<answer>\n4\n</answer>\n"
CHAT = [{"role": "user", "content": "2 + 2?"}]


def group(*texts: str, messages: Any = CHAT, **columns: Any) -> Group:
    completions = [Completion([index, 0], [-0.5, -0.1], True, text) for index, text in enumerate(texts)]
    return Group(Prompt(0, messages, (1, 2), columns), completions)


def score(name: str, text: str, **columns: Any) -> float | None:
    return call_reward(name, REWARDS.get(name), [group(text, **columns)])[0]


TEN_THOUSAND = ["10 000", "10\u00a0000", "10\u202f000", "10\u2009000", "10'000", "10\u2019000", "10_000", r"10\,000"]
TEN_THOUSAND += [r"10,\!000", r"10\!000", "10{,}000", "10~000", r"10\ 000", r"10\;000", "10,000", "$10,000", "1e4"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,080", 1080),
        ("-3", -3),
        ("+3", 3),
        ("3.0", 3),
        ("3.", 3),
        ("18.", 18),
        (".5", Fraction(1, 2)),
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("\u22127", -7),
        (" 12\n", 12),
        ("0.1", Fraction(1, 10)),
        ("1,234,567.25", Fraction(123456725, 100)),
        ("9" * 40, int("9" * 40)),
        *((text, 10_000) for text in TEN_THOUSAND),
        ("1,00,000", 100_000),
        ("1 234 567.5", Fraction(2469135, 2)),
        ("1e5", 100_000),
        ("1.5e-06", Fraction(3, 2_000_000)),
        (r"1.5 \times 10^{-6}", Fraction(3, 2_000_000)),
        ("2\u00d710\u207b\u00b3", Fraction(1, 500)),
        ("3 1/2", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        ("3\u00bd", Fraction(7, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"3 \frac12", Fraction(7, 2)),
        (r"\dfrac{1}{2}", Fraction(1, 2)),
        (r"\tfrac{3}{4}", Fraction(3, 4)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"\frac{1}{-2}", Fraction(-1, 2)),
        ("\u2212 7", -7),
        ("- 7", -7),
        ("\u0663", 3),
        ("\uff11\uff12", 12),
        ("\u0663\u066b\u0661\u0664", Fraction(157, 50)),
        (r"50\%", 50),
        (r"\$5", 5),
        ("5 \u20ac", 5),
        ("$18$", 18),
        (r"\(18\)", 18),
    ],
)
def test_parse_number(text: str, value: Any) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "²",
        "③",
        "1,0,8",
        "1,08",
        "nan",
        "NaN",
        "inf",
        "1/0",
        "-$-5",
        "3 apples",
        "1 2",
        "18..",
        *(
            "3,14",
            "1.234,56",
            "1.234.567",
            "12 34",
            "10 00",
            "1,000 000",
            "2020 100",
            "3 5/2",
            "1/2/3",
            "05/06",
            "3-1/2",
        ),
        *(
            "2nd",
            "5k",
            "5 million",
            "1e400",
            "10^6",
            "5\u00b2",
            "(5)",
            "5-",
            "--5",
            "5-10",
            "10:30",
            "0x10",
            "1e",
            "1__000",
        ),
    ]
    + ["9" * 41, "9" * 100_000],
)
def test_parse_number_refuses(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("first 3, then it costs $1,080.", 1080),
        ("so 24-7 is 17", 17),
        ("x = -7", -7),
        ("24-7", None),
        ("half: 1/2.", Fraction(1, 2)),
        ("none", None),
    ],
)
def test_last_number(text: str, value: Any) -> None:
    assert last_number(text) == value


def answer_of(inside: str) -> str:
    return f"<reasoning>\n1 2 3\n</reasoning>\n<answer>\n{inside}\n</answer>\n"


EIGHTEEN = [
    "18 dollars per hour",
    "x = 18",
    "Total = 18",
    "The answer is 18.",
    "USD 18",
    "18 km/h",
    "18kg",
    "18 m",
    "**18**",
]
EIGHTEEN += [r"18\text{ cm}", r"18^\circ", r"\boxed{18}", "$18$", "18!", "18 days a week"]
EIGHTEEN += [
    "18 points",
    "18 times",
    "18 times per day",
    "18 pairs of shoes",
    "18 quarters",
    "18 more apples",
    "18 less",
]
EIGHTEEN += ["US$18", "A$ 18.00", "kr 18", "18 %", "Total cost: $18", "The total is 18", "#### 18", "*18*", "18\u4e2a"]
EIGHTEEN += ["18 m^2", "18 cm\u00b2", "18 m/s^2", "18 square feet", "18 meters squared", r"18\text{ cm}^2", '18"']
NOT_FIVE = [
    "5 million",
    "not 5",
    "5 thousand",
    "5 thousandths",
    "at least 5",
    "5 or 6",
    "never 5",
    "minus 5",
    "5k",
    "5M",
    "5th",
]
NOT_FIVE += [
    "5 dozen",
    "half of 5",
    "5 not",
    "5 is wrong",
    "isn't 5",
    "5 Millionen",
    "5\u4e07",
    "about 5",
    "5-10",
    "5!!",
    "5x",
    "5 x",
]
NOT_FIVE += [
    "5 and a half",
    "5 squared",
    "5 halves",
    r"5\sqrt{2}",
    "3+2",
    "(5)",
    "5 plus one",
    "5,5",
    "5 isn't it",
    "not = 5",
    "5 more than six",
    "5 times ten",
    "5 point five",
    "5^2",
    "5 n^2",
    "5\ub9cc",
    "5 elfu",
    "total not: 5",
]


@pytest.mark.parametrize(
    ("inside", "gold", "value"),
    [
        ("1,080", "1080", 1.0),
        ("$18.00", "18", 1.0),
        ("18 eggs", "18", 1.0),
        ("18 or 19", "18", 0.0),
        ("18 - 0", "18", 0.0),
        ("5²", "5", 0.0),
        ("-18", "18", 0.0),
        ("24-7", "17", 0.0),
        ("", "18", 0.0),
        ("0.5", "1/2", 1.0),
        ("Paris", "Paris", 1.0),
        ("e\u0301", "\u00e9", 1.0),
        ("paris", "Paris", 0.0),
        *((text, "18", 1.0) for text in EIGHTEEN),
        *((text, "5", 0.0) for text in NOT_FIVE),
        ("5 million", "5000000", 0.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", 1.0),
        ("10000", "10{,}000", 1.0),
        ("10 000 dollars", "10000", 1.0),
        ("-7", "\u22127", 1.0),
        ("1500", r"1.5\times10^{3}", 1.0),
        ("5", r"5\text{ cm}", 1.0),
        ("5 cm", r"5\text{ cm}", 1.0),
        ("5 km", "5 m", 0.0),
        ("90\u00b0", r"90^\circ", 1.0),
        ("x = 5", "x=5", 1.0),
        ("5", "x=5", 1.0),
        ("y = 5", "x=5", 0.0),
        ("5", "5 million", 0.0),
        ("Paris", r"\text{Paris}", 1.0),
        ("Rome", r"\text{Paris}", 0.0),
        (r"\sqrt 2", r"\sqrt{2}", 0.0),
        (r"\frac{a}{b}", r"\dfrac{a}{b}", 0.0),
    ],
)
def test_accuracy(inside: str, gold: str, value: float) -> None:
    assert score("accuracy", answer_of(inside), answer=gold) == value


def test_accuracy_wants_one_answer_block() -> None:
    assert score("accuracy", "18", answer="18") == 0.0
    assert score("accuracy", "<answer>18", answer="18") == 0.0
    assert score("accuracy", "</answer>18<answer>", answer="18") == 0.0
    assert score("accuracy", "<answer>18</answer>", answer="18") == 1.0
    assert score("accuracy", "<answer>18</answer><answer>18</answer>", answer="18") == 0.0
    assert score("accuracy", "<answer>18</answer>", answer=None) is None
    assert score("accuracy", "<answer>18</answer>", answer=18) == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        ("  \n" + GOOD + "\n", 1.0),
        ("<reasoning>a\nb</reasoning><answer>4</answer>", 1.0),
        ("Sure! " + GOOD, 0.0),
        (GOOD + "Done", 0.0),
        (GOOD + GOOD, 0.0),
        ("<reasoning>a</reasoning>so<answer>4</answer>", 0.0),
        ("<answer>4</answer><reasoning>a</reasoning>", 0.0),
        ("<reasoning>a<answer>4</answer></reasoning>", 0.0),
        ("", 0.0),
    ],
)
def test_xml_format(text: str, value: float) -> None:
    assert score("xml_format", text) == value


def test_the_classics_on_a_perfect_completion() -> None:
    # xmlcount: four tags of 0.125; nothing follows "\n</answer>\n", and 1 - 1 = 0 characters too many follow the tag.
    assert score("xmlcount", GOOD) == 0.5
    assert score("soft_format", GOOD) == 0.0  # the dot stops at line breaks
    assert score("soft_format", "<reasoning>2 + 2</reasoning> \n <answer>4</answer>") == 0.5
    assert score("strict_format", GOOD) == 0.5
    assert score("strict_format", GOOD.replace("2 + 2", "2\n2")) == 0.0
    assert score("int", GOOD) == 0.5
    assert score("correctness", GOOD, answer="4") == 2.0
    assert score("correctness", GOOD, answer="4.0") == 0.0


def test_xmlcount_takes_off_what_follows_the_answer() -> None:
    # 10 characters after "\n</answer>\n": 0.5 - 0.010 - 0.010
    assert score("xmlcount", GOOD + "x" * 10) == pytest.approx(0.48)
    # No "\n</answer>\n": the whole 15 characters count, 0.125 - 0.015
    assert score("xmlcount", "abc\n<answer>\n12") == pytest.approx(0.110)
    assert score("xmlcount", "") == 0.0


def test_the_lenient_answer_is_the_last_one() -> None:
    assert lenient_answer("<answer>1</answer> no, <answer> 2 </answer> x </answer>") == "2"
    assert lenient_answer("just text ") == "just text"
    assert score("int", "<answer>²</answer>") == 0.5  # the known quirk of str.isdigit
    assert score("int", "<answer>-3</answer>") == 0.0


def test_format_rewards_agree_with_their_regular_expressions() -> None:
    soft = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
    parts = ["</reasoning>", "<answer>", "</answer>", "\n", " "]
    matches = 0
    for length in range(7):
        for chosen in itertools.product(parts, repeat=length):
            text = "<reasoning>" + "".join(chosen)
            expected = 0.5 if soft.match(text) else 0.0
            assert REWARDS.get("soft_format")(completions=[text]) == [expected], text
            matches += expected > 0
    assert matches > 100


HOSTILE = [
    "<reasoning>" + "</reasoning><answer>" * 5_000,
    "<reasoning>" + "</reasoning>\n<answer>" * 5_000,
    "<reasoning>\n" * 8_000,
    "<reasoning>\n\n</reasoning>\n<answer>\n" + "\n</answer>" * 10_000,
    "<reasoning>" + "</reasoning>" + " " * 100_000,
    "<answer>" + "9" * 100_000 + "</answer>",
    "<answer>" + "1," * 50_000 + "</answer>",
    "<answer>" + "-$" * 50_000 + "</answer>",
    "<answer>" + "1 " * 50_000 + "</answer>",
    "<answer>" * 12_500,
    "\n" * 100_000,
    "\\boxed{" * 14_000,
]


@pytest.mark.parametrize("name", ["xmlcount", "soft_format", "strict_format", "int", "correctness", "xml_format"])
def test_hostile_text_takes_bounded_time(name: str) -> None:
    check_time(name)


@pytest.mark.parametrize("name", ["accuracy", "exact_match"])
def test_hostile_answers_take_bounded_time(name: str) -> None:
    check_time(name)
    start = time.perf_counter()
    for text in HOSTILE:
        last_number(text)
    assert time.perf_counter() - start < 2


def check_time(name: str) -> None:
    start = time.perf_counter()
    values = call_reward(name, REWARDS.get(name), [group(*HOSTILE, answer="18")])
    assert time.perf_counter() - start < 2  # milliseconds, and seconds to hours where the time is quadratic or worse
    assert len(values) == len(HOSTILE)


def test_exact_match() -> None:
    assert score("exact_match", " caf\u00e9\n", answer="cafe\u0301") == 1.0
    assert score("exact_match", "cafe", answer="caf\u00e9") == 0.0
    assert score("exact_match", "so <answer>tea</answer>", answer="tea") == 1.0
    assert score("exact_match", "tea", answer=None) is None


def test_rewards_get_trl_arguments() -> None:
    seen: dict[str, Any] = {}

    def all_of_them(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(prompts)

    groups = [group("a", "b", answer="1", extra=5), group("c", "d", messages="text", answer="2")]
    call_reward("all_of_them", all_of_them, groups)
    assert {"trainer_state", "log_extra", "log_metric"} <= seen.keys()
    for name in ("trainer_state", "log_extra", "log_metric"):
        del seen[name]
    assert seen == {
        "prompts": [CHAT, CHAT, "text", "text"],
        "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], "c", "d"],
        "completion_ids": [[0, 0], [1, 0], [0, 0], [1, 0]],
        "answer": ["1", "1", "2", "2"],
        "extra": [5, 5, None, None],
    }


def test_a_reward_gets_only_what_it_names() -> None:
    def by_answer(answer: list[str]) -> list[float | None]:
        return [float(text) for text in answer]

    assert call_reward("by_answer", by_answer, [group("a", "b", answer="3", other=1)]) == [3.0, 3.0]


def test_numbers_of_every_kind_are_taken() -> None:
    values = [True, 2, numpy.float32(0.5), None]
    taken = call_reward("kinds", lambda completions: values, [group("a", "b", "c", "d")])
    assert taken == [1.0, 2.0, 0.5, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], r"'bad' returned nan for completion number 1, 'second one'.*finite"),
        ([1.0, math.inf], r"'bad' returned inf for completion number 1, 'second one'"),
        ([10**400, 1.0], r"'bad' returned inf for completion number 0, 'first'"),
        ([1.0, "1.0"], r"'bad' returned a str \('1.0'\) for completion number 1, 'second one'"),
        ([1.0], r"'bad' returned 1 values for 2 completions.*number 1, 'second one'"),
        ([1.0, 1.0, 1.0], r"'bad' returned 3 values for 2 completions"),
        (1.0, r"'bad' returned a float, it must return a list.*'first'"),
        (None, r"'bad' returned a NoneType"),
    ],
)
def test_a_bad_return_value_is_named(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call_reward("bad", lambda completions: values, [group("first", "second one")])


class NotAnException(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, NotAnException])
def test_a_reward_that_raises_is_named_with_its_completion(kind: type[BaseException]) -> None:
    def fragile(completions: Any) -> list[float | None]:
        if any("bad" in completion for completion in completions):
            raise kind("cannot read it")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'fragile' raised .*cannot read it.* number 2, 'bad" + "x" * 117) as caught:
        call_reward("fragile", fragile, [group("a", "b", "bad" + "x" * 500, messages="text")])
    assert isinstance(caught.value.__cause__, kind)
    assert len(str(caught.value)) < 300


def test_reward_sum_leaves_out_what_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(completions: Any) -> list[float | None]:
        return [1.0, None, 3.0, None]

    def second(completions: Any) -> list[float | None]:
        return [10.0, 20.0, None, None]

    def watched(completions: Any) -> list[float | None]:
        return [7.0, 7.0, 7.0, 7.0]

    entries = {"first": first, "second": second, "watched": watched}
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, **entries})
    scores = RewardSum({"first": 2.0, "second": -0.5, "watched": 0.0})([group("a", "b"), group("c", "d")])
    # 2 * 1 - 0.5 * 10 = -3    -0.5 * 20 = -10    2 * 3 = 6    nothing applies (a watched reward never counts)
    torch.testing.assert_close(
        scores.rewards_PG, torch.tensor([[-3.0, -10.0], [6.0, math.nan]], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(
        scores.by_name["first"], torch.tensor([[1.0, math.nan], [3.0, math.nan]], dtype=torch.float64), equal_nan=True
    )
    assert scores.by_name["watched"].tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_check_columns_names_what_is_missing() -> None:
    RewardSum({"accuracy": 1.0, "xml_format": 0.2}).check_columns({"question", "answer"})
    RewardSum({"xml_format": 0.2}).check_columns(set())
    message = r"'accuracy' needs the column 'answer'.*columns there: gold, question"
    with pytest.raises(ConfigError, match=message):
        RewardSum({"accuracy": 1.0}).check_columns({"question", "gold"})


def test_reward_sum_refuses_unknown_names_and_weights() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        RewardSum({"acuracy": 1.0})
    with pytest.raises(ConfigError, match="weight of 'accuracy' is nan"):
        RewardSum({"accuracy": math.nan})


def with_settings(completions: Any, answer: Any, limit: int = 5, factor: float = 1.0, **columns: Any) -> list[float]:
    return [factor * min(limit, len(completion[0]["content"])) for completion in completions]


def test_keyword_arguments_reach_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "limited": with_settings})
    groups = [group("a" * 9, "b", answer="1")]
    assert RewardSum({"limited": 1.0})(groups).rewards_PG.tolist() == [[5.0, 1.0]]
    limited = RewardSum({"limited": 1.0}, {"limited": {"limit": 8, "factor": 2}})
    limited.check_columns({"answer"})
    assert limited(groups).rewards_PG.tolist() == [[16.0, 2.0]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"accuracy": {}}, "reward_kwargs has 'accuracy', it must be one of the rewards: limited"),
        (
            {"limited": {"limits": 8}},
            "reward 'limited' has no argument 'limits': did you mean 'limit'\\? It accepts answer",
        ),
        ({"limited": {"completions": 8}}, "reward 'limited' has no argument 'completions'"),
        ({"limited": {"columns": 8}}, "reward 'limited' has no argument 'columns'"),
        ({"limited": {"limit": "8"}}, "argument 'limit' of reward 'limited' is '8', needs int"),
        ({"limited": {"limit": True}}, "argument 'limit' of reward 'limited' is True, needs int"),
        ({"limited": {"factor": None}}, "argument 'factor' of reward 'limited' is None, needs float"),
    ],
)
def test_keyword_arguments_are_checked_against_the_signature(
    monkeypatch: pytest.MonkeyPatch, kwargs: Any, message: str
) -> None:
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "limited": with_settings})
    with pytest.raises(ConfigError, match=message):
        RewardSum({"limited": 1.0}, kwargs)


def test_a_keyword_argument_cannot_hide_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "limited": with_settings})
    with pytest.raises(ConfigError, match="argument 'limit' of reward 'limited' is also a column of the data"):
        RewardSum({"limited": 1.0}, {"limited": {"limit": 8}}).check_columns({"answer", "limit"})


def test_rewards_import_without_torch() -> None:
    """Worker processes import these modules: torch would take seconds and hundreds of megabytes in each."""
    program = (
        "import importlib, pkgutil, sys\n"
        "import grpo.rewards, grpo.types\n"
        "for found in pkgutil.iter_modules(grpo.rewards.__path__):\n"
        "    importlib.import_module('grpo.rewards.' + found.name)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_built_in_names_are_found_without_importing_their_modules_first() -> None:
    program = (
        "import sys\n"
        "from grpo.rewards.registry import REWARDS, reward_labels\n"
        "assert REWARDS.get('countdown').__module__ == 'grpo.rewards.countdown'\n"
        "assert 'grpo.rewards.prose' not in sys.modules\n"
        "assert REWARDS.get('accuracy').__module__ == 'grpo.rewards.math_answers'\n"
        "print(*REWARDS.names())\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert set(shown.split()) == {
        *("accuracy", "chrf", "correctness", "cosine_scaled", "countdown", "environment", "exact_match"),
        *("feedback", "int"),
        *("language_guard", "reasoning_gym", "repetition_penalty"),
        *(
            "length_guard",
            "math_verify",
            "right_steps",
            "soft_format",
            "strict_format",
            "term_match",
            "token_f1",
            "xml_format",
        ),
        "xmlcount",
    }


def test_other_keyword_arguments_make_it_another_run() -> None:
    now = {"reward_kwargs": {"mine.py:brevity": {"limit": 40}}}
    with pytest.raises(ConfigError, match=r"reward_kwargs .*--allow_changes '\[reward_kwargs\]'"):
        check_changes({"reward_kwargs": {}}, now, [])
    assert check_changes({}, now, []) == []  # a checkpoint of a version without the key


@pytest.mark.parametrize(
    ("text", "right", "form", "flexible"),
    [
        ("<think>is it <answer>7</answer>?</think>\n<reasoning>a</reasoning><answer>8</answer>", 1.0, 1.0, True),
        ("so 7</think><answer>8</answer>", 1.0, 0.0, True),  # the template has opened the thought
        ("<think>it is <answer>8</answer>", 0.0, 0.0, False),  # cut off while thinking
        ("<think>8</think>", 0.0, 0.0, False),
        ("<think>7</think>It is 8.", 0.0, 0.0, True),
    ],
)
def test_what_is_judged_comes_after_the_thinking(text: str, right: float, form: float, flexible: bool) -> None:
    scores = [REWARDS.get(name)(completions=[text], answer=["8"])[0] for name in ("accuracy", "xml_format")]
    assert scores == [right, form]
    assert is_correct_in_any_format(text, "8") is flexible


def test_a_file_finds_the_modules_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and relatively, while it is imported and later; a registered name survives a second import."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside_a.py").write_text(
        "from grpo import register_reward\n@register_reward('beside_test')\n"
        "def one(completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "lib" / "beside_b.py").write_text(
        "from beside_a import one\nfrom .beside_c import TWO\n"
        "def two(completions, **_):\n    import beside_d as d\n    return [TWO + d.ZERO for _ in completions]\n"
    )
    (tmp_path / "lib" / "beside_c.py").write_text("TWO = 2.0\n")
    (tmp_path / "lib" / "beside_d.py").write_text("ZERO = 0.0\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    try:
        two, one = REWARDS.get("lib/beside_b.py:two"), REWARDS.get("lib/beside_a.py:one")
        assert call_reward("two", two, [group("a")]) == [2.0] and call_reward("one", one, [group("a")]) == [1.0]
        assert sys.path[: len(path)] == path  # nothing is shadowed
        assert address_of(two) == f"{tmp_path}/lib/beside_b.py:two"
    finally:
        sys.path[:] = path


def test_a_module_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package_of_scores").mkdir()
    (tmp_path / "my_package_of_scores" / "scores.py").write_text("def f(completions, **_):\n    return [1.0]\n")
    (tmp_path / "broken_module_here.py").write_text("raise ValueError('no')\n")
    (tmp_path / "values_of_mine.py").write_text("RATE = 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert call_reward("f", REWARDS.get("my_package_of_scores.scores:f"), [group("a")]) == [1.0]
    with pytest.raises(ConfigError, match=r"module 'broken_module_here' cannot be imported: ValueError\('no'\)"):
        REWARDS.get("broken_module_here:f")
    for name in ("values_of_mine:RATE", "values_of_mine.py:RATE"):
        with pytest.raises(ConfigError, match=r"RATE is 0.5 \(float\), it must be a function or a class"):
            RewardSum({name: 1.0})


def test_labels_are_as_short_as_they_can_be() -> None:
    names = ["accuracy", "/home/me/mine.py:brevity", "pkg.scores:clarity"]
    assert reward_labels(names) == dict(zip(names, ["accuracy", "brevity", "clarity"], strict=True))
    names = ["/a/mine.py:f", "/a/other.py:f", "/b/other.py:f", "f"]
    assert reward_labels(names) == dict(zip(names, ["mine.py:f", "/a/other.py:f", "/b/other.py:f", "f"], strict=True))
