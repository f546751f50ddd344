from grpo.advantages import register_advantage as register_advantage
from grpo.compat.arguments import GRPOConfig as GRPOConfig
from grpo.compat.trl import GRPOTrainer as GRPOTrainer
from grpo.config.parser import load_config as load_config
from grpo.config.schema import Config as Config
from grpo.data.registry import register_dataset as register_dataset
from grpo.kl import register_kl as register_kl
from grpo.losses import register_loss as register_loss
from grpo.rewards.registry import register_reward as register_reward
from grpo.rollout.engine import register_engine as register_engine
from grpo.tracking.tracker import register_tracker as register_tracker
from grpo.trainer import train as train

__version__: str
