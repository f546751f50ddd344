"""Weights: a live model, sharded or with an adapter or in mixed precision -> the plain model that engines sample from.

    full_weights      the weights by their plain names, whole and merged, one at a time
    WorkingCopy       the plain model that holds them; whatever can share memory with the live model does

What is saved, exported or sent to a server comes from `full_weights` too: there is one way to read a policy.
"""

import copy
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.models.lora import delta, lora_layers, plain_name
from grpo.models.strategies import deepspeed as zero


class Float32Head(nn.Linear):
    """The output head, always in float32: logits that are rounded to bfloat16 put an error of 1e-2 on every logprob."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


def full_weights(
    model: nn.Module, wanted: Collection[str] | None = None, *, masters: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(plain name, tensor) of each parameter of `model`: gathered where it is sharded, its adapter merged in.

    Collective where the model is sharded: every rank must go through all of it. `wanted` limits the names. Tied weights
    come once. The tensors may be the live ones: copy, do not keep. `masters`: under DeepSpeed, whose live weights are
    rounded, the float32 ones behind them.
    """
    adapted = {f"{name}.base_layer.weight": layer for name, layer in lora_layers(model)}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if plain is None or (wanted is not None and plain not in wanted):
            continue
        layer = adapted.get(name)
        with torch.no_grad(), zero.gathered([parameter] if layer is None else list(layer.parameters())):
            tensor = whole(parameter) if masters and layer is None else full(parameter)
            if layer is not None:
                tensor = tensor + full(delta(layer)).to(tensor.dtype)
            elif hasattr(parameter, "ds_id"):
                tensor = tensor.clone()  # DeepSpeed frees it at the end of the block
        yield plain, tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of an FSDP2 shard, a 4-bit weight as numbers; any other tensor as it is."""
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, tensor.quant_state)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def whole(parameter: nn.Parameter) -> Tensor:
    """What the optimizer moves, whole: under DeepSpeed the float32 master, otherwise the parameter. Collective where sharded."""
    master = zero.master(parameter)
    return full(parameter) if master is None else master


class WorkingCopy:
    """The plain model that engines read: same architecture, no wrapper, no shards, no adapter.

    # full fine-tuning in float32        the live model itself: nothing to do, nothing to pay
    # mixed precision                    linear weights in the compute dtype, as autocast would cast them at every call
    # LoRA                               the adapted layers merged, everything else shared
    # FSDP2, ZeRO-3                      all of it, once per rank, in the compute dtype
    # read while training goes on        all of it (rollout.max_staleness)

    `refresh` after every optimizer step. The live weights are only read, so they cannot drift however often it is called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes the shape of `model`, which must not have an adapter or a wrapper yet. Shares all of its memory."""
        self.own: dict[str, nn.Parameter] = {}
        self.live: PreTrainedModel = model
        if getattr(model, "is_quantized", False):
            config = copy.deepcopy(model.config)
            dtype = config.quantization_config.bnb_4bit_compute_dtype
            del config.quantization_config
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            self.model.to(model.device).eval().set_attn_implementation(model.config._attn_implementation)
            self.model.generation_config = model.generation_config
        else:
            # deepcopy takes what the memo holds as already copied: the parameters are not.
            self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()

    def follow(
        self,
        live: PreTrainedModel,
        device: torch.device,
        *,
        compute: torch.dtype | None,
        rounded: torch.dtype | None = None,
        sharded: bool,
        separate: bool = False,
        hold: bool = True,
    ) -> None:
        """Give memory of its own to what `live` will not hold in the form that sampling wants: called once `live` has
        its adapter, before it gets a wrapper. `device`: where sampling is. `compute`: the dtype of mixed precision, None = as the weights are.
        `rounded`: the dtype that the live weights themselves are about to get (ZeRO-2). `separate`: share nothing. Not
        `hold`: nobody samples here, so nothing takes memory; `stream` alone is used."""
        self.live = live
        adapted = {f"{name}.weight" for name, _ in lora_layers(live)}
        quantized = getattr(live, "is_quantized", False)
        head = self.model.get_output_embeddings()
        shared: dict[int, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{module_name}.{leaf}"
                cast = compute is not None and isinstance(module, nn.Linear) and module is not head and leaf == "weight"
                if not (separate or sharded or quantized or cast or name in adapted):
                    continue
                if id(parameter) not in shared:
                    dtype = compute if cast else rounded or parameter.dtype
                    place = device if hold else torch.device("meta")
                    owned = torch.empty_like(parameter, dtype=dtype, device=place, requires_grad=False)
                    shared[id(parameter)] = self.own[name] = nn.Parameter(owned, requires_grad=False)
                setattr(module, leaf, shared[id(parameter)])
        self.dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        if not hold:
            self.own = {}
        # Layers that recompute their activations drop the KV cache: sampling then keeps the copy, which shares all memory.
        if not self.own and not live.is_gradient_checkpointing:
            self.model = live

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight in the dtype that it samples in, one at a time: for an engine that is elsewhere.
        Collective where the live weights are sharded."""
        for name, tensor in full_weights(self.live, masters=False):
            yield name, tensor.to(self.dtypes.get(name, tensor.dtype))

    def refresh(self) -> None:
        """Bring the copy up to date with the live weights. Collective where those are sharded."""
        if not self.own:
            return
        with torch.no_grad():
            for name, tensor in full_weights(self.live, wanted=self.own, masters=False):
                self.own[name].copy_(tensor)


def plain_shell(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture without memory: what `save_pretrained` needs to name and lay out given weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)


def save_plain(model: PreTrainedModel, folder: Path, *, write: bool) -> None:
    """A plain Hugging Face folder of `model`, whole and merged; only where `write` is true does this process write.

    Collective where the weights are sharded.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in full_weights(model):
        if write:
            state[name] = tensor.to("cpu", torch.float32)
    if not write:
        return
    shell = plain_shell(model)
    shell.set_attn_implementation("sdpa")
    shell.generation_config = model.generation_config
    if getattr(shell.config, "tie_word_embeddings", False):
        embedding = shell.get_input_embeddings()
        names = {id(part): name for name, part in shell.named_modules()}
        state.setdefault(f"{names[id(shell.get_output_embeddings())]}.weight", state[f"{names[id(embedding)]}.weight"])
    shell.save_pretrained(folder, state_dict=state)
