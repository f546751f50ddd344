from grpo.advantages import register_advantage as register_advantage
from grpo.config.parser import load_config as load_config
from grpo.config.schema import Config as Config
from grpo.data.registry import register_dataset as register_dataset
from grpo.losses import register_objective as register_objective
from grpo.rewards.registry import register_reward as register_reward
from grpo.rollout.engine import register_engine as register_engine
from grpo.trainer import train as train
