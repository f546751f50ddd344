"""Checks of a config before data and weights load. `train` and `check` call the same ones, so that both agree."""

import logging
from pathlib import Path
from typing import Any

from grpo.config.schema import Config, flatten, to_dict
from grpo.config.validation import check_config
from grpo.errors import ConfigError
from grpo.registry import check_is_no_import
from grpo.rewards.scoring import RewardSum
from grpo.rewards.sources import changed_sources
from grpo.run.checkpoint import read_state
from grpo.run.checkpointer import check_is_unfinished, migrate
from grpo.run.components import check_components
from grpo.run.resume import check_changes
from grpo.tracking.tracker import check_trackers

log = logging.getLogger(__name__)


def check_settings(config: Config) -> None:
    """Check everything that the config says by itself. `train` and `check` call it first.

    Raises:
        ConfigError: A value, a name or a combination cannot be used.
    """
    check_is_no_import()
    check_config(config)
    check_components(config)
    check_trackers(config)


def check_resume(
    config: Config, checkpoint: Path, run_dir: Path, rewards: RewardSum, processes: int | None
) -> dict[str, Any]:
    """Log the settings that changed since the checkpoint, and return its state.

    Args:
        processes: Number of ranks that go on; None where it is not known yet.

    Raises:
        ConfigError: The run is finished, or settings differ that may not change.
    """
    saved = migrate(read_state(checkpoint))
    check_is_unfinished(checkpoint, saved["step"], config, run_dir)
    before = saved["processes"]
    changes = check_changes(
        saved["config"], flatten(to_dict(config)), config.allow_changes, (before, processes or before)
    )
    for line in changes:
        log.info(line)
    changed = changed_sources(saved["reward_sources"], rewards.sources)
    refused = {key: lines for key, lines in changed.items() if key not in config.allow_changes}
    if refused:
        raise ConfigError(
            f"resume: {'; '.join(line for lines in refused.values() for line in lines)}: that would be another run. "
            f"Put the old file back, or go on with --allow_changes '[{', '.join(changed)}]'"
        )
    for line in (line for lines in changed.values() for line in lines):
        log.warning("resume: %s: further steps use the new version", line)
    return saved
