"""The configs in launch/configs: they load, and those to train with pay in full for a right answer."""

from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.config.schema import flatten, to_dict
from grpo.rewards.scoring import RewardSum
from grpo.types import Completion, Group, Prompt

FOLDER = Path(__file__).parents[2] / "launch" / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CLASSIC = [name for name in CONFIGS if name.endswith("_classic_rewards")]
RIGHT = "<reasoning>\n4 + 4 = 8\n8 - 3 = 5\n</reasoning>\n<answer>\n5\n</answer>\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_right_answer_of_two_lines_earns_every_reward(name: str) -> None:
    config = load_config([f"--config={FOLDER / name}.yaml"])
    if "accuracy" not in config.rewards and name not in CLASSIC:
        pytest.skip("answers in prose")
    columns = {"answer": "5", "solution": "4 + 4 = 8\n8 - 3 = 5\n#### 5"}
    group = Group(Prompt(0, "q", (), columns), [Completion([1], [0.0], True, RIGHT)])
    scores = RewardSum(config.rewards, config.reward_kwargs)([group])
    paid = {reward: float(values[0, 0]) for reward, values in scores.by_name.items()}
    dead = {reward for reward, value in paid.items() if value == 0}
    assert dead == ({"soft_format", "strict_format"} if name in CLASSIC else set())


@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_config_differs_in_rewards_optimizer_and_length_only(name: str) -> None:
    classic, plain = (
        flatten(to_dict(load_config([f"--config={FOLDER / stem}.yaml"])))
        for stem in (name, name.removesuffix("_classic_rewards"))
    )
    different = {key for key in classic if classic[key] != plain[key]}
    assert {key.partition(".")[0] for key in different} == {"rewards", "optimizer", "sampling"}
    assert "sampling.max_completion_length" in different and plain["optimizer.learning_rate"] == 1e-6
