"""Source files of tools and environments, recorded with the run as those of rewards are (grpo/rewards/sources.py)."""

from grpo.config.schema import Config
from grpo.rewards.sources import Sources, reward_sources
from grpo.turns.environment import ENVIRONMENTS
from grpo.turns.tools import TOOLS


def turn_sources(config: Config) -> Sources:
    """Return the files of the tools and the environment of a run. Their `key` is the config key that names them.

    Call it when they have just been loaded: a checkpoint records what the run uses.
    """
    tools = reward_sources({name: TOOLS.get(name) for name in config.tools})
    name = config.environment
    environment = reward_sources({name: ENVIRONMENTS.get(name)} if name else {})
    return {
        label: {**source, "key": key}
        for key, sources in (("tools", tools), ("environment", environment))
        for label, source in sources.items()
    }
