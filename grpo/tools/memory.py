"""Memory estimate: config, model shape and machine -> bytes on each process. No weights are loaded.

Persistent memory is arithmetic (arXiv 1910.02054, section 3.1). For N weights in float32, T of them trained, without
shards (models/strategies/ has the other cases), in bytes:

    weights 4 N      gradients 4 T      AdamW's moments 8 T      frozen reference 4 N      for sampling: `working_copy`

Activations and temporary memory of the backward pass are simulated. Forward and backward passes run on fake tensors,
which have shapes but no memory, and the bytes alive at the same time are counted.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from grpo.config.schema import Config, LoraConfig
from grpo.errors import raise_device_error
from grpo.kernels.attention import NAME, PackedLayout
from grpo.kernels.head import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from grpo.models.architecture import create_model, text_config, vocabulary_size
from grpo.models.experts import cast_weights, use_grpo_experts
from grpo.models.families import describe
from grpo.models.loading import recompute_activations
from grpo.models.logprob_model import LogprobModel
from grpo.models.lora import add_adapter
from grpo.models.mixers import use_grpo_mixers
from grpo.models.strategies.base import Machine, ModelSize
from grpo.models.strategies.registry import strategy_class
from grpo.objectives.entropy import has_entropy_bonus
from grpo.packing import PackedBatch, pack
from grpo.rollout.engine import find_engine
from grpo.types import Completion, Group, Prompt

log = logging.getLogger(__name__)

GIB = 2**30
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_USED = ("num_experts_per_tok", "moe_k", "num_experts_per_token")
"""Names of the number of experts of a layer, and of those that compute a token."""


def estimate(
    config: Config, model: PreTrainedModel, longest_prompt: int, machine: Machine, used: "Simulated | None" = None
) -> dict[str, float]:
    """Estimate the memory of each process of a run.

    Not included are the program itself and, on GPUs, the CUDA context and gaps between allocations.

    Args:
        config: the config of the run.
        model: the model, on the meta device.
        longest_prompt: tokens of the longest prompt.
        machine: the settings of the accelerate config file.
        used: the result of `simulate` for the same batches, if it is known.

    Returns:
        GiB by part, and "peak": persistent memory plus the larger of sampling and training.
    """
    strategy = strategy_class(machine)
    used = used or simulate(model, config, longest_prompt, machine)
    size = model_size(config, model, used.trained)
    state = strategy.memory(size, machine)
    has_copy = config.objective.beta > 0 and (config.lora.r is None or config.model.reference is not None)
    parts: dict[str, float] = {
        "weights": state.weights,
        "gradients": state.gradients,
        "AdamW": state.optimizer,
        "reference": 4 * size.total if has_copy and not (config.model.reference_offload and not machine.cpu) else 0,
        "working copy": working_copy(machine, config, model),
    }
    engine = engine_bytes(config, model, longest_prompt, machine)
    if not machine.cpu:  # captured graphs refer to it
        parts["engine: cache and its own layout of the weights"] = engine
    stays = sum(parts.values())
    learning = used.activations + state.gathered
    if machine.compute and not machine.cpu:  # a GPU's head product reads a 16-bit copy
        learning += 2 * model.get_output_embeddings().weight.numel()
    sampling = draw_bytes(config, model, machine) + (engine if machine.cpu else 0)
    parts |= {"sampling": sampling, "learning: activations": learning}
    parts["peak"] = stays + max(sampling - state.released, learning)
    if state.start is not None:
        parts["start: what is not sharded yet"] = state.start
        parts["peak"] = max(parts["peak"], state.start + parts["weights"] + parts["reference"] + parts["working copy"])
    return {name: value / GIB for name, value in parts.items()}


def model_size(config: Config, model: PreTrainedModel, trained: int) -> ModelSize:
    """Return the numbers of weights that the memory of a strategy depends on."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return ModelSize(
        total=sum(sizes),
        trained=trained,
        largest_weight=max(sizes),
        largest_unit=largest_unit(model),
        loaded_bytes=bytes_per_weight(config) * sum(sizes),
        adapter_bytes=4 * trained if config.lora.r is not None else 0,
    )


def bytes_per_weight(config: Config) -> int:
    """Return the bytes per loaded weight. Only a frozen base may be in 16 bits."""
    return 2 if config.lora.r is not None and config.model.torch_dtype == "bfloat16" else 4


def linear_weights(model: nn.Module) -> int:
    """Return the number of weights in linear layers other than the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear) and part is not head)


def expert_weights(model: nn.Module) -> int:
    """Return the number of weights in stacked experts."""
    return sum(getattr(part, name).numel() for part in model.modules() for name in cast_weights(part))


def working_copy(machine: Machine, config: Config, model: PreTrainedModel) -> float:
    """Return the bytes that `WorkingCopy` (grpo/models/weights.py) does not share with the live weights."""
    if find_engine(config.rollout.engine).has_own_weights:
        return 0
    strategy = strategy_class(machine)
    size, linear = sum(parameter.numel() for parameter in model.parameters()), linear_weights(model)
    cast = linear + expert_weights(model)
    base = bytes_per_weight(config)
    is_rounded = strategy.holds_rounded_weights()
    width = 2 if machine.compute and not is_rounded else base
    if strategy.shards_weights or config.rollout.max_staleness > 0:
        return width * cast + base * (size - cast)
    if is_rounded and config.lora.r is None:
        return 0
    if machine.compute and not is_rounded:
        return width * cast
    if config.lora.r is not None and config.lora.target_modules == ["all-linear"]:
        return base * linear
    return _adapted(config.lora, model)


def _adapted(lora: LoraConfig, model: PreTrainedModel) -> float:
    """Return the bytes of the linear layers that have adapters, in float32."""
    if lora.r is None:
        return 0
    ends = tuple(lora.target_modules)
    return sum(
        4 * part.weight.numel()
        for name, part in model.named_modules()
        if name.endswith(ends) and hasattr(part, "weight")
    )


def largest_unit(model: PreTrainedModel) -> int:
    """Return the number of weights in the largest part that is gathered at once: a layer, or the embedding."""
    layers = model._no_split_modules or []
    units = [m for m in model.modules() if type(m).__name__ in layers]
    units += [model.get_input_embeddings(), model.get_output_embeddings()]
    return max(sum(parameter.numel() for parameter in unit.parameters()) for unit in units)


def engine_bytes(config: Config, model: PreTrainedModel, longest_prompt: int, machine: Machine) -> float:
    """Return the bytes of the KV cache and of the native engine's own layout of the weights."""
    if find_engine(config.rollout.engine).has_own_weights:
        return 0
    cache = slots_of(config, model, longest_prompt, machine) * cache_per_slot(config, model, longest_prompt, machine)
    if not find_engine(config.rollout.engine).repacks_weights or describe(model) is None:
        return cache
    width = 2 if machine.compute else 4
    head = model.get_output_embeddings().weight.numel()
    # On a CPU, float32 weights and the head are packed. On a GPU, the head is cast in mixed precision.
    return cache + width * linear_weights(model) + (4 * head if machine.cpu else 2 * head if machine.compute else 0)


def cache_per_slot(config: Config, model: PreTrainedModel, longest_prompt: int, machine: Machine) -> float:
    """Return the bytes of the keys and values of one completion."""
    shape = text_config(model.config)
    queries = getattr(shape, "num_attention_heads", 0)
    if not queries:  # Mamba: a state of fixed size
        return 0
    heads = getattr(shape, "num_key_value_heads", None) or queries
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // queries
    width = 2 if machine.compute else 4
    longest = longest_prompt + config.sampling.max_completion_length
    return 2 * width * longest * shape.num_hidden_layers * heads * head_size


def slots_of(config: Config, model: PreTrainedModel, longest_prompt: int, machine: Machine) -> int:
    """Return the number of completions decoded at a time, limited by rollout.slots and rollout.cache_gib."""
    mine = -(-config.prompts_per_step // machine.processes) * config.sampling.num_generations
    slots = min(config.rollout.slots, mine)
    if find_engine(config.rollout.engine).bounds_cache and config.rollout.cache_gib is not None:
        slots = min(slots, int(config.rollout.cache_gib * GIB / cache_per_slot(config, model, longest_prompt, machine)))
    return max(slots, 1)


def draw_bytes(config: Config, model: PreTrainedModel, machine: Machine) -> float:
    """Return the bytes of the logits of a decoding step and of three temporaries of the same size."""
    mine = -(-config.prompts_per_step // machine.processes) * config.sampling.num_generations
    own = find_engine(config.rollout.engine).has_own_weights
    return 0 if own else 4 * 4 * min(config.rollout.slots, mine) * vocabulary_size(model)


@dataclass(frozen=True)
class Simulated:
    """Result of `simulate`."""

    trained: int
    """Number of weights that are trained."""
    activations: int
    """Maximum bytes alive at once in an update, beyond weights, gradients and moments."""


def simulate(model: PreTrainedModel, config: Config, longest_prompt: int, machine: Machine) -> Simulated:
    """Run forward and backward passes on fake tensors, with the largest batch that the config makes.

    Every layer of a kind keeps the same memory, so models with 2 and 3 periods of layers determine that of all layers.
    Where layers read numbers that fake tensors do not have (the choice of experts), the activations are counted.
    """
    if text_config(model.config) is not model.config:
        return _counted(model, config, longest_prompt, machine)
    try:
        return _simulated(model, config, longest_prompt, machine)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise_device_error(error)
        log.debug("memory: %s cannot be simulated: %s", type(model).__name__, error)
        return _counted(model, config, longest_prompt, machine)


def _simulated(model: PreTrainedModel, config: Config, longest_prompt: int, machine: Machine) -> Simulated:
    layers, period = model.config.num_hidden_layers, layer_period(model.config)
    if layers <= max(4, 3 * period):
        return _simulate(model.config, config, longest_prompt, machine)
    two, three = (_simulate(_shorter(model.config, n * period), config, longest_prompt, machine) for n in (2, 3))
    further = layers - 2 * period
    return Simulated(
        two.trained + further * (three.trained - two.trained) // period,
        two.activations + further * (three.activations - two.activations) // period,
    )


def layer_period(shape: Any) -> int:
    """Return the number of layers after which their kinds repeat. Attention in a window counts as attention.

    It is the number of all layers if nothing repeats.
    """
    kinds = [
        "attention" if kind.endswith("attention") and not kind.startswith("linear") else kind
        for kind in getattr(shape, "layer_types", None) or ()
    ]
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), max(len(kinds), 1))


def _counted(model: PreTrainedModel, config: Config, longest_prompt: int, machine: Machine) -> Simulated:
    """Count the inputs and outputs of all linear layers for the tokens of the largest batch, in float32.

    Each expert computes a part of the tokens. With gradient checkpointing, one layer is alive at a time.
    """
    batches = step_batches(config, longest_prompt, machine.processes)
    tokens = max(len(batch.input_ids_T) for batch in batches)
    with torch.device("meta"):
        made = create_model(model.config, torch.float32)
        if config.lora.r is not None:
            add_adapter(made, config.lora, base="")
    trained = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    shape = text_config(model.config)
    # A matrix of k x n is linear or holds the experts' ones: k inputs and n outputs per token.
    experts = next((getattr(shape, key) for key in EXPERTS if getattr(shape, key, None)), 1)
    used = next((getattr(shape, key) for key in EXPERTS_USED if getattr(shape, key, None)), 1)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {id(part.weight) for part in (head, embedding)}
    width = 0
    for parameter in model.parameters():
        if parameter.ndim < 2 or id(parameter) in ends:
            continue
        share = min(used, experts) if parameter.ndim == 3 and len(parameter) == experts else 1
        width += share * sum(parameter.shape[-2:])
    if config.model.gradient_checkpointing:
        width = 2 * width // max(shape.num_hidden_layers, 1) + shape.num_hidden_layers * shape.hidden_size
    logits = min(CHUNK_BYTES["cpu"] if machine.cpu else CHUNK_BYTES_ELSEWHERE, 4 * tokens * vocabulary_size(model))
    return Simulated(trained, 4 * tokens * width + 2 * logits)


def _shorter(shape: Any, layers: int) -> Any:
    """Return the config of the same architecture with fewer layers."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:layers]
    return shape


def _simulate(shape: Any, config: Config, longest_prompt: int, machine: Machine) -> Simulated:
    batches = step_batches(config, longest_prompt, machine.processes)
    batch = max(batches, key=lambda batch: len(batch.input_ids_T))
    with torch.device("meta"):
        made = create_model(shape, torch.float32).train()
        made.set_attn_implementation(NAME)
        use_grpo_mixers(made)
        use_grpo_experts(made)
        if config.lora.r is not None:
            add_adapter(made, config.lora, base="")
        if config.model.gradient_checkpointing:
            recompute_activations(made)
    trained = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    # Gradients of earlier batches exist, and this one's are added to them. Sharded gradients never exist as a whole:
    # only one layer's, and the shard that it is added to.
    strategy = strategy_class(machine)
    there = len(batches) > 1 or strategy.shards_gradients
    logprob_model = LogprobModel(
        made,
        uses_packed_attention=True,
        temperature=1.0,
        entropy_gradient=has_entropy_bonus(config.objective),
        uses_kernels=machine.cpu and strategy.uses_kernels,
    )
    logprob_model.accumulate_grads_inplace = machine.kind == "single"
    layout = _layout(batch, machine)
    # The layout's tensors are real: they are small, and their values are needed before the simulation.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _materialise(made)
        if there:
            for parameter in made.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        live, enabled = LiveBytes(), machine.compute is not None
        with _chunks_of(machine):
            compute = machine.compute or torch.bfloat16
            with live, torch.autocast("cpu", dtype=compute, enabled=enabled, cache_enabled=False):
                logprobs, _ = logprob_model(_Faked(batch, layout, fake))
            with live:
                logprobs.sum().backward()
    return Simulated(trained, live.peak if there else max(live.peak - 4 * trained, 0))


def _layout(batch: PackedBatch, machine: Machine) -> PackedLayout:
    """Return the layout of `batch` as on `machine`, with all cached indices computed from real tensors."""
    layout = batch.layout
    layout.one_by_one = machine.cpu
    for span in batch.spans:
        for block in layout.blocks(span):
            layout.padding(block)
    assert layout.sequences
    return layout


@contextlib.contextmanager
def _chunks_of(machine: Machine) -> Iterator[None]:
    """Context in which logits have the block size of `machine`, although the fake tensors are on the CPU."""
    usual = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = usual if machine.cpu else CHUNK_BYTES_ELSEWHERE
    try:
        yield
    finally:
        CHUNK_BYTES["cpu"] = usual


def _materialise(model: nn.Module) -> None:
    """Replace the "meta" tensors of a model by fake tensors on the CPU. Tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Faked:
    """A packed batch on fake tensors, with a layout computed before."""

    def __init__(self, batch: PackedBatch, layout: PackedLayout, fake: FakeTensorMode) -> None:
        self.layout = layout
        for name, value in vars(batch).items():
            setattr(self, name, fake.from_tensor(value) if isinstance(value, torch.Tensor) else value)


def step_batches(config: Config, longest_prompt: int, processes: int) -> list[PackedBatch]:
    """Return the batches that one process makes of a step in which every completion has the maximum length."""
    mine = -(-config.prompts_per_step // processes)
    length = config.sampling.max_completion_length
    completion = Completion([2] * length, [0.0] * length, False, "")
    groups = [
        Group(Prompt(i, "", (2,) * max(longest_prompt, 1)), [completion] * config.sampling.num_generations)
        for i in range(mine)
    ]
    advantages = torch.ones(mine, config.sampling.num_generations)
    return pack(groups, advantages, max_tokens=config.tokens_per_batch)


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensors made by operations while they are referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in taken:
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: weakref.ref) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
