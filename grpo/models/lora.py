"""LoRA adapters: a model -> the same model with small trainable matrices beside chosen layers.

    W x  ->  W x + (lora_alpha / r) * B (A x)          (Hu et al., arXiv 2106.09685)    B starts at 0

With the adapter disabled the model is exactly the initial one, so the reference policy takes no memory. Training never
merges in place, so that merging cannot change the base weights: engines sample from a working copy (weights.py). This
is the only file that imports peft.
"""

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config.schema import LoraConfig
from grpo.errors import ConfigError, raise_device_error
from grpo.models.architecture import frozen_parts
from grpo.models.experts import widen_experts
from grpo.models.lora_wide import widen

Adapter = Any
"""A `peft.PeftModel`. The annotation does not import peft, which is optional."""

ADAPTER_NAME = "default"


def add_adapter(model: PreTrainedModel, config: LoraConfig, base: str) -> Adapter:
    """Add an adapter to `model` in place and freeze everything else.

    Args:
        model: The causal LM.
        config: The `lora.*` section of the config.
        base: Name of the base model that a saved adapter records.

    Returns:
        The handle for `adapter_disabled` and `save_adapter`.

    Raises:
        ConfigError: peft is missing, no layer matches lora.target_modules, or a target is tied to another layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora.r is set, but peft is missing: pip install peft==0.21.2") from error
    assert config.r is not None
    targets = config.target_modules[0] if config.target_modules == ["all-linear"] else config.target_modules
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        exclude_modules=_excluded(model, config.target_modules == ["all-linear"]) or None,
        use_rslora=config.use_rslora,
        lora_dropout=0.0,  # with dropout, the policy that trains would differ from the one that samples
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        with warnings.catch_warnings():  # of transformers about a call in peft
            warnings.simplefilter("ignore", FutureWarning)
            # peft sets patterns for stacked experts itself, and warns that no module has the parameter's name.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        known = sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules {config.target_modules}: {error} This model's linear layers are {', '.join(known)}; "
            f"all-linear takes all but the head"
        ) from error
    for _, layer in lora_layers(model):
        widen(layer)
        if hasattr(layer, "parameter_name"):
            widen_experts(layer)
    tied = getattr(embedding, "weight", None) is getattr(head, "weight", None)
    for name, layer in lora_layers(model):
        if tied and layer.get_base_layer() in (embedding, head):
            raise ConfigError(
                f"lora.target_modules {config.target_modules} takes in {name}, whose weight is tied to the other end "
                f"of the model: one of the two would change without the other. Leave it out"
            )
    return adapted


def _excluded(model: PreTrainedModel, all_linear: bool) -> list[str]:
    """Return the names of linear layers that get no adapter.

    These are the layers that text does not reach, layers that return more than a product (the routers of some
    families) and, with all-linear, those of Mamba whose weights its kernels read directly: they would not see the
    adapter.
    """
    frozen = {name for name, _ in frozen_parts(model)}
    excluded = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (f"{name}.weight" in frozen or _is_router(module)):
            excluded.append(name)
        if all_linear and hasattr(module, "A_log") and hasattr(module, "D"):
            excluded += [f"{name}.{part}" for part in ("out_proj", "dt_proj") if hasattr(module, part)]
    return excluded


def _is_router(module: nn.Linear) -> bool:
    kind = type(module)
    return kind.forward is not nn.Linear.forward and "Router" in kind.__name__


@contextlib.contextmanager
def adapter_disabled(adapter: Adapter) -> Iterator[None]:
    """Disable the adapter within: the model computes what it did before `add_adapter`."""
    with adapter.disable_adapter():
        yield


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over (name, layer) of the layers with an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield name, module


def adapted_parameter(layer: Any) -> nn.Parameter:
    """Return the parameter that the adapter of `layer` is added to: a weight, or the matrices of all experts."""
    parameter: nn.Parameter = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return parameter


def delta_weight(layer: Any) -> Tensor:
    """Return (lora_alpha / r) * B A in the layout of the layer's weight, differentiable in A and B."""
    return layer.get_delta_weight(ADAPTER_NAME)


def head_weight(head: nn.Module) -> Tensor:
    """Return the weight [V, H] of the output head, its adapter included. Logprobs are computed from it directly."""
    weight = head.weight
    if hasattr(head, "lora_A") and not head.disable_adapters:
        return weight + delta_weight(head)  # type: ignore[operator]
    return weight  # type: ignore[return-value]


def plain_name(name: str) -> str | None:
    """Return a parameter's name in the model without adapter, or None for a parameter of the adapter.

    # model.layers.0.self_attn.q_proj.base_layer.weight     -> model.layers.0.self_attn.q_proj.weight
    # model.layers.0.self_attn.q_proj.lora_A.default.weight -> None
    """
    if ".lora_" in name:
        return None
    return name.replace(".base_layer", "")


def save_adapter(adapter: Adapter, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which peft and vLLM load, and a README.md.

    Args:
        adapter: The handle that `add_adapter` returned.
        folder: The folder to write.
        weights: Full tensors by their names in the model; None to take the live ones.
    """
    state = None if weights is None else {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    adapter.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").write_text(_adapter_readme(adapter), encoding="utf-8")  # in place of peft's template


def _adapter_readme(adapter: Adapter) -> str:
    settings = next(iter(adapter.peft_config.values()))
    base = str(settings.base_model_name_or_path)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    header = ["---", "library_name: peft", *([f"base_model: {base}"] if on_hub else []), "tags: [grpo, lora]", "---"]
    return "\n".join(
        [
            *header,
            "# LoRA adapter",
            "",
            f"A LoRA adapter of rank {settings.r}, trained with Group Relative Policy Optimization (arXiv 2402.03300). "
            "Its base model is `base_model_name_or_path` in `adapter_config.json`.",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("this folder")',
            "```",
            "",
            "`python launch/export.py --run RUN --format adapter` writes it with a model card, `--format merged` the "
            "merged weights.",
            "",
        ]
    )


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `base` with the adapter in `folder` merged in, for export and chat.

    Raises:
        ConfigError: peft is missing, or the folder holds no adapter that fits `base`.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"{folder} holds a LoRA adapter, but peft is missing: pip install peft==0.21.2") from error
    if not (folder / "adapter_model.safetensors").is_file():  # peft would look for a pickle next, then on the hub
        raise ConfigError(f"{folder} holds no adapter_model.safetensors; adapter_model.bin, a pickle, is not read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise_device_error(error)
        raise ConfigError(f"the adapter in {folder} does not fit this base model: {error}") from error
    return merged


def check_quantization() -> None:
    """Check that bitsandbytes, which 4-bit base weights (QLoRA, arXiv 2305.14314) need, is installed.

    Raises:
        ConfigError: It is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.load_in_4bit is true, but bitsandbytes is missing: pip install bitsandbytes, or set it to "
            "false (lora.r then trains beside full-precision base weights; model.torch_dtype bfloat16 halves those)"
        )
