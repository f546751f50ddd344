"""Weights: a live model, sharded or with an adapter or in mixed precision -> full weights under their plain names.

WeightReader      the one way to read a live model: gathered, merged, one parameter at a time
WorkingCopy       the plain model that engines sample from; shares what memory it can with the live model
save_model        a plain Hugging Face folder
"""

import contextlib
import copy
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from grpo.config.schema import Config
from grpo.models.architecture import create_model, float32_head, logit_transform
from grpo.models.experts import cast_weights, use_grpo_experts
from grpo.models.lora import adapted_parameter, delta_weight, lora_layers, plain_name
from grpo.models.mixers import use_grpo_mixers
from grpo.models.norms import use_grpo_norms

SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightReader:
    """Reads the parameters of a live model. This base class is for parameters that are whole on this process.

    A distribution strategy overrides the hooks. They are collective where the strategy shards parameters.
    """

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `parameters` are whole."""
        return contextlib.nullcontext()

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the whole of a sharded tensor, or the numbers of a 4-bit weight. The result may share its memory."""
        if hasattr(tensor, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(tensor.data, tensor.quant_state)
        return tensor.detach()

    def master_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole weight that the optimizer updates: the parameter, or its float32 master if it is rounded."""
        return self.full_tensor(parameter)

    def numel(self, parameter: nn.Parameter) -> int:
        """Return the number of elements of the whole parameter."""
        return parameter.numel()

    def full_weights(
        self,
        model: nn.Module,
        names: Collection[str] | None = None,
        *,
        masters: bool = True,
        merges_adapter: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights of `model` under the names of the model without adapter and wrapper.

        Parameters are gathered where they are sharded, and adapters are merged in. Tied weights come once. Buffers
        that belong to the model's file (the routing bias of DeepSeek-V3, the layer scale of Gemma 4) follow. Collective
        where the model is sharded: every rank must exhaust the iterator.

        Args:
            model: The live model.
            names: The plain names to read; None for all.
            masters: Read the float32 master weights where the live ones are rounded.
            merges_adapter: Add adapters to the weights. Otherwise their parameters come under their own names.

        Yields:
            Plain name and full tensor. The tensor may be the live one: copy it to keep it.
        """
        adapted = {id(adapted_parameter(layer)): layer for _, layer in lora_layers(model)} if merges_adapter else {}
        for name, parameter in model.named_parameters():
            plain = plain_name(name) if merges_adapter else plain_name(name) or name
            if plain is None or (names is not None and plain not in names):
                continue
            layer = adapted.get(id(parameter))
            with torch.no_grad(), self.gathered([parameter] if layer is None else list(layer.parameters())):
                if layer is not None:
                    tensor = self.full_tensor(parameter)
                    tensor = tensor + self.full_tensor(delta_weight(layer)).to(tensor.dtype)
                else:
                    tensor = self.master_weight(parameter) if masters else self.full_tensor(parameter)
            yield plain, tensor
        for module_name, module in model.named_modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                plain = plain_name(f"{module_name}.{leaf}")
                persistent = leaf not in module._non_persistent_buffers_set
                if persistent and plain is not None and (names is None or plain in names):
                    yield plain, self.full_tensor(buffer)


class WorkingCopy:
    """The plain model that engines sample from: same architecture, without wrapper, shards or adapter.

    # full fine-tuning in float32        the live model itself: no memory, no work
    # mixed precision                    linear weights and experts in the compute dtype, as they would be cast at every
    #                                    call
    # LoRA in float32                    adapted layers merged, everything else shared
    # LoRA in 16 bits                    as without, and the adapter beside its weights: a merged weight would round
    #                                    small changes away
    # FSDP2, ZeRO-3                      everything, once per rank, in the compute dtype
    # sampling during training           everything (rollout.max_staleness)

    `refresh` copies the live weights, which it only reads: no number of merges can change them.

    Attributes:
        model: The plain model.
        own: The parameters with memory of their own, by name. All others are parameters of the live model.
        is_allocated: `model` has weights. False where no engine samples in this process.
    """

    def __init__(self, model: PreTrainedModel, reader: WeightReader) -> None:
        """Create a copy that shares all memory with `model`, which must not have an adapter or a wrapper yet."""
        self.live, self.reader = model, reader
        self.own: dict[str, nn.Parameter] = {}
        self.keeps_adapter = self._holds_frozen = False
        if getattr(model, "is_quantized", False):
            dtype = model.config.quantization_config.bnb_4bit_compute_dtype
            self.model = create_model(unquantized_config(model), dtype)
            float32_head(self.model, logit_transform(model))
            self.model.to(model.device).eval()  # type: ignore[arg-type]
            self.model.set_attn_implementation(model.config._attn_implementation)
            use_grpo_mixers(self.model)
            use_grpo_experts(self.model)
            use_grpo_norms(self.model)
            self.model.generation_config = model.generation_config
            buffers = dict(self.model.named_buffers())
            for name, buffer in model.named_buffers():
                buffers[name].copy_(buffer)
        else:
            # deepcopy takes what the memo holds as already copied: the parameters are not.
            self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()

    def bind(
        self,
        live: PreTrainedModel,
        device: torch.device,
        *,
        compute_dtype: torch.dtype | None,
        live_dtype: torch.dtype | None = None,
        sharded: bool = False,
        separate: bool = False,
        allocate: bool = True,
    ) -> None:
        """Allocate the weights that `live` will not hold in the form in which sampling needs them.

        Call it once `live` has its adapter and before it is wrapped. If `model` got the same adapter, it keeps it.

        Args:
            live: The model that is trained.
            device: The device that samples.
            compute_dtype: The dtype that linear weights and experts are cast to; None if they are used as they are.
            live_dtype: The dtype that the strategy is about to cast the live weights to; None if it leaves them.
            sharded: The live weights will be sharded, so that nothing can be shared with them.
            separate: Share no memory, so that the copy can be read while the live weights change.
            allocate: False where no engine samples in this process. Only `weights` is used then.
        """
        self.live = live
        self.keeps_adapter = any(True for _ in lora_layers(self.model))
        parameters = {id(adapted_parameter(layer)) for _, layer in lora_layers(live)}
        adapted = {plain_name(name) for name, parameter in live.named_parameters() if id(parameter) in parameters}
        if self.keeps_adapter:
            adapted = set()
        trained = dict(live.named_parameters())
        quantized = getattr(live, "is_quantized", False)
        head = self.model.get_output_embeddings()
        head = getattr(head, "base_layer", head)
        allocated: dict[int, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            stacked = cast_weights(module)
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{module_name}.{leaf}"
                plain = plain_name(name)
                if plain is None:  # a parameter of the adapter
                    if not (separate or sharded):
                        setattr(module, leaf, trained[name])
                        continue
                    empty = torch.empty_like(trained[name], device=device, requires_grad=False)
                    self.own[name] = nn.Parameter(empty, requires_grad=False)
                    setattr(module, leaf, self.own[name])
                    continue
                name = plain
                is_linear = isinstance(module, nn.Linear) and module is not head and leaf == "weight"
                cast = compute_dtype is not None and (is_linear or leaf in stacked)
                if not (separate or sharded or quantized or cast or name in adapted):
                    continue
                if id(parameter) not in allocated:
                    dtype = compute_dtype if cast else live_dtype or parameter.dtype
                    place = device if allocate else torch.device("meta")
                    empty = torch.empty_like(parameter, dtype=dtype, device=place, requires_grad=False)
                    allocated[id(parameter)] = self.own[name] = nn.Parameter(empty, requires_grad=False)
                setattr(module, leaf, allocated[id(parameter)])
        self._dtypes = {plain_name(name) or name: value.dtype for name, value in self.model.named_parameters()}
        self.is_allocated = allocate
        if not allocate:
            self.own = {}
        # Layers with gradient checkpointing drop the KV cache, so sampling keeps the copy, which shares all memory.
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in live.modules())
        if not self.own and not checkpointing:
            self.model = live

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, full tensor) of all weights in the dtype of sampling, for an engine in another process.

        Collective where the live weights are sharded.
        """
        for name, tensor in self.reader.full_weights(self.live, masters=False):
            yield name, tensor.to(self._dtypes.get(name, tensor.dtype))

    def refresh(self) -> None:
        """Copy the live weights. Collective where they are sharded."""
        if not self.own:
            return
        names: Collection[str] = self.own
        if self.keeps_adapter and self._holds_frozen:  # only the adapter has changed
            names = [name for name in self.own if plain_name(name) is None]
        merges = not self.keeps_adapter
        with torch.no_grad():
            for name, tensor in self.reader.full_weights(self.live, names, masters=False, merges_adapter=merges):
                self.own[name].copy_(tensor)
        self._holds_frozen = True


def bytes_on_disk(
    model: nn.Module, reader: WeightReader, *, has_adapter: bool, has_synced_reference: bool
) -> tuple[int, int]:
    """Estimate the sizes of a checkpoint and of the saved model, in bytes.

    A checkpoint holds the trained weights and two moments, all float32, and a reference that is not frozen.
    """
    total = trained_with_ties = 0
    for _, parameter in model.named_parameters(remove_duplicate=False):  # a tied head is saved under both its names
        total += reader.numel(parameter) * parameter.element_size()
        trained_with_ties += reader.numel(parameter) if parameter.requires_grad else 0
    trained = sum(reader.numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    moments, reference = 8 * trained, total if has_synced_reference else 0
    if not has_adapter:
        return total + moments + reference, total
    adapter = 4 * trained_with_ties
    return adapter + moments + reference, total + adapter


def unquantized_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return a copy of the model's config that describes the same model with full weights."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def save_live_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save a model whose parameters are whole, unadapted and in full precision as a Hugging Face folder."""
    if dtype != torch.float32:
        save_full_weights(model, WeightReader(), folder, dtype=dtype)
        return
    model.save_pretrained(folder)


def save_full_weights(
    model: PreTrainedModel,
    reader: WeightReader,
    folder: Path,
    *,
    write: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Save any live model as a plain Hugging Face folder in `dtype`: gathered, its adapter merged in.

    Collective where the weights are sharded. Only processes with `write` hold the whole model, on their CPU, and save.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in reader.full_weights(model):
        if write:
            state[name] = tensor.to("cpu", dtype)
    if not write:
        return
    with torch.device("meta"):  # `save_pretrained` needs the architecture, not the memory
        empty = create_model(unquantized_config(model), dtype)
    empty.generation_config = model.generation_config
    if getattr(empty.config, "tie_word_embeddings", False):
        embedding = empty.get_input_embeddings()
        names = {id(module): name for name, module in empty.named_modules()}
        head = f"{names[id(empty.get_output_embeddings())]}.weight"
        state.setdefault(head, state[f"{names[id(embedding)]}.weight"])
    empty.save_pretrained(folder, state_dict=state)


def save_dtype(config: Config, path: str) -> torch.dtype:
    """Return the dtype of final/: `save_dtype`, or that of the model in `path`; float32 for a GGUF."""
    if config.save_dtype is not None:
        return SAVE_DTYPES[config.save_dtype]
    if config.model.gguf_file:
        return torch.float32
    try:
        stored = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return torch.float32
    return stored.dtype if stored.dtype in SAVE_DTYPES.values() else torch.float32
