"""Construction of the trained model: a path and the config -> model, adapter, reference, working copy, optimizer."""

import copy
import logging
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.gguf import plain_model
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.architecture import vocabulary_size
from grpo.models.given_adapter import load_given_adapter, take_given_adapter
from grpo.models.loading import recompute_activations
from grpo.models.logprob_model import LogprobModel
from grpo.models.lora import Adapter, add_adapter
from grpo.models.optimizers import OPTIMIZERS, build_scheduler
from grpo.models.reference import AdapterReference, FrozenReference, check_vocabulary
from grpo.models.routers import LoadBalance, experts_line, load_balance
from grpo.models.strategies.base import Strategy
from grpo.models.strategies.registry import strategy_for
from grpo.models.weights import WorkingCopy
from grpo.objectives.entropy import has_entropy_bonus
from grpo.runtime.precision import compute_dtype

log = logging.getLogger(__name__)


@dataclass
class TrainedModel:
    """The parts of a policy."""

    strategy: Strategy
    model: PreTrainedModel
    """The live causal LM, with its adapter. Its parameters may be shards."""
    uses_packed_attention: bool
    logprob_model: nn.Module
    """Packed batch -> logprobs [N] and entropies [N] of `model`, wrapped by the strategy."""
    working_copy: WorkingCopy
    adapter: Adapter | None
    reference: FrozenReference | AdapterReference | None
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    shares_prompts: bool
    """Batches of one optimizer step may share the forward pass of a prompt."""
    balance: LoadBalance | None
    """Load balancing of a mixture of experts."""


def build_trained_model(
    accelerator: Accelerator,
    path: str,
    config: ModelConfig,
    objective: ObjectiveConfig,
    optimizer_config: OptimizerConfig,
    lora: LoraConfig | None,
    *,
    temperature: float,
    optimizer_steps: int,
    separate_sampler: bool,
    sampled_elsewhere: bool,
) -> TrainedModel:
    """Load and assemble everything that training needs of the model. See `Policy` for the arguments.

    Raises:
        ConfigError: A model cannot be loaded or is not supported.
    """
    create_optimizer = OPTIMIZERS.get(optimizer_config.optim)
    strategy = strategy_for(accelerator)
    strategy.configure(config, optimizer_config)
    given = take_given_adapter(path)
    model, uses_packed_attention = strategy.load(path, config)
    working_copy = WorkingCopy(model, strategy)
    logprob_model = LogprobModel(
        model,
        uses_packed_attention=uses_packed_attention,
        temperature=temperature,
        entropy_gradient=has_entropy_bonus(objective),
        uses_kernels=strategy.uses_kernels,
    )
    has_adapter = lora is not None and lora.r is not None
    reference: FrozenReference | AdapterReference | None = None
    if objective.beta > 0 and (config.reference or not has_adapter):
        reference = _frozen_reference(strategy, logprob_model, path, config)
    adapter = (
        add_adapter(model, lora, base=plain_model(path, config.gguf_file)) if lora is not None and has_adapter else None
    )
    if given:
        load_given_adapter(model, given)
        if objective.beta > 0 and reference is None and not strategy.exposes_weights:
            raise ConfigError(
                "objective.beta with an adapter that was trained before: the reference is its first weights, which "
                "DeepSpeed cannot exchange: use FSDP, or processes that each hold the model"
            )
    if config.gradient_checkpointing:
        recompute_activations(model)
        for module in model.modules():
            # Checkpointing is active in train mode only. The modules below a layer stay in eval mode, which switches
            # off whatever they would do otherwise (dropout, noise in a router).
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    logprob_model.balance = balance = load_balance(model, objective.router_aux_loss_coef, accelerator)
    line = experts_line(model, balance, adapted=has_adapter)
    if line is not None:
        log.info(line)
    compute, rounded = compute_dtype(accelerator), strategy.holds_rounded_weights()
    in_16_bits = compute is not None or working_copy.model.dtype != torch.float32
    if lora is not None and has_adapter and in_16_bits and not sampled_elsewhere:
        add_adapter(working_copy.model, lora, base=path)
        working_copy.model.eval()
    working_copy.bind(
        model,
        accelerator.device,
        compute_dtype=None if rounded else compute,
        live_dtype=compute if rounded else None,
        sharded=strategy.shards_weights,
        separate=separate_sampler,
        allocate=not sampled_elsewhere,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_optimizer(trained, optimizer_config, fused=strategy.fused_optimizer)
    module = strategy.prepare(logprob_model, optimizer)
    if objective.beta > 0 and reference is None:
        reference = AdapterReference(module, adapter, is_given=bool(given))
    return TrainedModel(
        strategy=strategy,
        model=model,
        uses_packed_attention=uses_packed_attention,
        logprob_model=module,
        working_copy=working_copy,
        adapter=adapter,
        reference=reference,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, optimizer_config, optimizer_steps),
        # A checkpointed layer must run once in each direction.
        balance=balance,
        shares_prompts=uses_packed_attention and strategy.supports_shared_prompts and not config.gradient_checkpointing,
    )


def _frozen_reference(
    strategy: Strategy, logprob_model: LogprobModel, path: str, config: ModelConfig
) -> FrozenReference:
    """Return a frozen copy of the policy before training, or of the model that model.reference names."""
    if config.reference is None:
        model, uses_packed_attention = copy.deepcopy(logprob_model.model), logprob_model.uses_packed_attention
    else:
        plain = ModelConfig(attn_implementation=config.attn_implementation)
        model, uses_packed_attention = strategy.load(config.reference, plain)
        check_vocabulary(
            vocabulary_size(logprob_model.model),
            vocabulary_size(model),
            load_tokenizer(path, config.gguf_file),
            load_tokenizer(config.reference),
            config.reference,
        )
    strategy.replicate(model)
    frozen = LogprobModel(
        model,
        uses_packed_attention=uses_packed_attention,
        temperature=logprob_model.temperature,
        uses_kernels=logprob_model.uses_kernels,  # the same sums in the same order: the KL starts at exactly 0
    )
    return FrozenReference(frozen, strategy.accelerator.device, offload=config.reference_offload)
