"""Reward of the environment: the last reward that its `step` returned."""

from grpo.rewards.registry import register_reward


@register_reward("environment")
def environment(environment_reward: list[float | None]) -> list[float | None]:
    """Return the rewards that the environment gave. None where it gave none: the completion was cut off, for example.

    Args:
        environment_reward: one per completion.
    """
    return environment_reward
