"""Loading: a folder or hub id -> a causal LM with every dropout 0 and its output head in float32.

A strategy may load on the main process alone, create `empty_model` on the others and distribute the weights
(grpo/models/strategies/fsdp.py).
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from grpo.config.schema import ModelConfig
from grpo.data.gguf import plain_model
from grpo.data.tokenizer import check_exists, check_has_model
from grpo.errors import ConfigError
from grpo.kernels.attention import NAME
from grpo.kernels.head import IDENTITY, LogitTransform
from grpo.models.architecture import auto_class, create_model, find_transform, float32_head, frozen_parts
from grpo.models.experts import use_grpo_experts
from grpo.models.logprob_model import use_grpo_attention
from grpo.models.lora import check_quantization
from grpo.models.mixers import use_grpo_mixers
from grpo.models.norms import use_grpo_norms
from grpo.runtime.precision import PRECISIONS

disable_progress_bar()  # "Loading weights 38/38" would interrupt our own log


_live: dict[str, PreTrainedModel] = {}
"""Path -> the model in memory that is trained instead of the weights there."""


@contextlib.contextmanager
def live_model(path: str, model: PreTrainedModel) -> Iterator[None]:
    """Let `path`, which holds the config of `model`, stand for `model` itself within. It is trained in place."""
    _live[path] = model
    try:
        yield
    finally:
        del _live[path]


def load_for_training(path: str, config: ModelConfig, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """Load a causal LM on this process, and use packed attention in it where configured and exact.

    Args:
        path: A folder or hub id.
        config: The `model.*` section of the config.
        device: Where a 4-bit model is quantized. Other weights are read on the CPU and stay there.

    Returns:
        The model, and whether it uses packed attention (grpo/kernels/attention.py).

    Raises:
        ConfigError: The model cannot be loaded or is not supported.
    """
    model = prepared(_live[path], path) if path in _live else load_model(path, config, device)
    return model, config.attn_implementation == NAME and use_grpo_attention(model)


def empty_model(config: PretrainedConfig, path: str, transform: LogitTransform) -> PreTrainedModel:
    """Create the model of `config` with parameters on the meta device. Buffers have memory: RoPE's are in no file.

    Args:
        config: The config of a model that another process has loaded.
        path: Its name, for messages.
        transform: What it does with the product of its head (`logit_transform`).
    """
    attention = config._attn_implementation
    with init_empty_weights(include_buffers=False):
        model = create_model(config, path=path)
    model.tie_weights()  # on the meta device, each name got a parameter of its own
    model.set_attn_implementation(attention)
    use_grpo_mixers(model)
    return prepare_model(model, transform)


def load_model(path: str, config: ModelConfig | None = None, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal LM with every dropout 0 and its output head in float32.

    Args:
        path: A folder, hub id or GGUF file.
        config: torch_dtype, attn_implementation, load_in_4bit and gguf_file; None for float32 and sdpa attention.
        device: Where a 4-bit model is quantized; None for the CPU.

    Raises:
        ConfigError: The model cannot be loaded, or its logprobs could not be computed exactly.
    """
    check_exists(path)
    name, path = path, plain_model(path, config.gguf_file if config else None)
    check_has_model(name, path)
    extra: dict[str, object] = {}
    dtype = torch.float32
    if config is not None:
        # Packed attention replaces the model's own later, if a probe finds it exact.
        if config.attn_implementation != NAME:
            extra["attn_implementation"] = config.attn_implementation
        dtype = getattr(torch, config.torch_dtype)
        if config.load_in_4bit:
            check_quantization()
            from transformers import BitsAndBytesConfig

            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            extra["device_map"] = {"": device or torch.device("cpu")}
    try:
        kind = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=False), path)
        model = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.name '{path}' cannot be loaded: {error}") from error
    except SafetensorError as error:
        raise ConfigError(
            f"model.name '{path}' cannot be loaded: a weight file is damaged or was copied in part ({error}): "
            f"copy it again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # out of memory, say
            raise
        raise ConfigError(
            f"model.name '{path}' cannot be loaded: its weights have other shapes than its config.json says: the "
            f"files are of two models"
        ) from error
    for (
        module
    ) in model.modules():  # bitsandbytes' packed layout for some CPUs has no gradient and cannot be dequantized
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepared(model, path)


def prepared(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Prepare a loaded causal LM in place, and find out what it does with the product of its head.

    Raises:
        ConfigError: Its logprobs could not be computed exactly.
    """
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model.name '{path}': {type(model).__name__} has no output head: use a model for text")
    prepare_model(model, IDENTITY)
    model.get_output_embeddings().transform = find_transform(model, PRECISIONS[model.dtype].hidden, path)
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch on gradient checkpointing. transformers warns of its own older name for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def prepare_model(model: PreTrainedModel, transform: LogitTransform) -> PreTrainedModel:
    """Put the output head in float32, set every dropout to 0, so that sampling and training see one policy, and
    freeze what text does not reach.

    The noise of routers is left alone: it is off in eval mode, and some read its size in eval mode too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    for _, parameter in frozen_parts(model):
        parameter.requires_grad_(False)
    float32_head(model, transform)
    use_grpo_experts(model)
    use_grpo_norms(model)
    return model.eval()
