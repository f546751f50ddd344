"""right_steps: the equations of a completion against those of the worked solution."""

import pytest

from grpo.rewards.equations import equations_in, right_steps

SOLUTION = "3+4=7\n7-2=5\n5+4=9\n9-1=8\n#### 8"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 3 + 4 = 7, and 7-2=5.", ["3+4=7", "7-2=5"]),
        ("2 × 3 x 4 = 24 and 8 ÷ 2 = 4", ["2*3*4=24", "8/2=4"]),
        ("1.5 + 2 = 3.5; 3 - 5 = -2", ["1.5+2=3.5", "3-5=-2"]),
        ("3 + 4 is 7, a = 3, 7 = 3 + 4", []),
        ("1+" * 50_000, []),
    ],
)
def test_equations_in(text: str, found: list[str]) -> None:
    assert equations_in(text) == found


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("<reasoning>\n3+4=7\n7-2=5\n5+4=9\n9-1=8\n</reasoning>", 1.0),
        ("3+4=7\n7-2=6\n6+4=10\n10-1=9", 1 / 4),  # wrong from the second one on
        ("3 + 4 = 7, then 7 - 2 = 5", 2 / 4),
        ("7-2=5\n3+4=7", 0.0),  # not from the first one on
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8\n8+1=9", 4 / 5),  # more than there are
        ("8", 0.0),
    ],
)
def test_the_share_of_right_steps(completion: str, share: float) -> None:
    assert right_steps([completion], solution=[SOLUTION]) == [share]


def test_other_forms_of_completions_and_solutions() -> None:
    chat = [{"role": "assistant", "content": "6*4 = 24"}]
    assert right_steps([chat, "1"], solution=["so 6*4=<<6*4=24>>24\n#### 24", "no equation"]) == [1.0, None]


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8", 1.0),
        ("3+4=7\n7-2=6\n6+4=10\n10-1=9", 3 / 4),  # one wrong result, carried forward
        ("3+4=8\n8-2=6\n6+4=10\n10-1=9", 3 / 4),
        ("3+4=7\n7-5=2\n2+4=6\n6-1=5", 3 / 4),  # one wrong number
        ("3+4=7\n7+2=9\n9+4=13\n13-1=12", 3 / 4),  # one wrong operation
        ("3+4=8\n7-2=5\n5+4=9\n9-1=8", 3 / 4),  # the solution's own number is right, too
        ("3+4=8\n8-2=5\n6+4=10\n10-1=9", 1 / 4),  # 6 is nobody's result
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8\n8+1=9", 4 / 5),
        ("3+4=7", 1 / 4),
        ("8", 0.0),
    ],
)
def test_errors_are_carried_forward(completion: str, share: float) -> None:
    assert right_steps([completion], solution=[SOLUTION], carry_errors=True) == [share]


def test_errors_are_carried_forward_through_products_and_rounding() -> None:
    solution = ["2+3=5, 2*5+5/2=12.5, 12.5/3=4.17"]
    shares = {
        "2+3=6, 2*6+6/2=15, 15/3=5": 2 / 3,
        "2+3=5, 2*5+5/2=12.5, 12.5/3=4.17": 1.0,  # rounded as in the solution
        "2+3=0, 2*0+0/2=0, 0/3=0": 2 / 3,
        "2+3=0, 2*5+5/0=7, 7/3=2": 0.0,
        "-2+3=1, 2*-1+1/2=-1.5": 0.0,
    }
    for completion, share in shares.items():
        assert right_steps([completion], solution=solution, carry_errors=True) == [share], completion


@pytest.mark.parametrize(
    ("completion", "plain", "carried"),
    [
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8<answer>8</answer>", 1.0, 1.0),
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8<answer>9</answer>", 4 / 5, 4 / 5),  # an earlier result
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8", 4 / 5, 4 / 5),  # no answer
        ("3+4=7\n7-2=6\n6+4=10\n10-1=9<answer>9</answer>", 1 / 5, 4 / 5),  # follows from the wrong step
        ("3+4=7\n7-2=6\n6+4=10\n10-1=9<answer>10</answer>", 1 / 5, 3 / 5),
        ("3+4=7\n7-2=6\n6+4=10\n10-1=9<answer>8</answer>", 1 / 5, 4 / 5),  # the gold answer all the same
        ("3+4=7\n7-2=5<answer>5</answer>", 2 / 5, 2 / 5),  # steps left out: its last result does not count
        ("3+4=7\n7-2=5<answer>8</answer>", 2 / 5, 3 / 5),
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8\n8+1=9<answer>9</answer>", 4 / 6, 4 / 6),
        ("3+4=7\n7-2=5\n5+4=9\n9-1=8<answer>8</answer><answer>9</answer>", 4 / 5, 4 / 5),
    ],
)
def test_the_answer_as_a_step(completion: str, plain: float, carried: float) -> None:
    more = {"solution": [SOLUTION], "answer": ["8"], "include_answer": True}
    assert right_steps([completion], **more) == [plain]
    assert right_steps([completion], carry_errors=True, **more) == [carried]


def test_the_answer_counts_only_where_there_is_one() -> None:
    for gold in (None, "blue"):
        assert right_steps(["3+4=7<answer>7</answer>"], ["3+4=7"], [gold], include_answer=True) == [1.0]
    assert right_steps(["3+4=7"], ["3+4=7"], include_answer=True) == [1.0]
    assert right_steps(["7<answer>7</answer>"], ["no equation"], ["7"], include_answer=True) == [None]
