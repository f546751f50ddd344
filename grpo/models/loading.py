"""Loading: a folder or hub id -> a causal LM with every dropout 0 and its output head in float32.

A strategy may load on the main process alone, create `empty_model` on the others and distribute the weights
(grpo/models/strategies/fsdp.py).
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from grpo.config.schema import ModelConfig
from grpo.data.gguf import plain_model
from grpo.data.tokenizer import check_exists
from grpo.errors import ConfigError
from grpo.kernels.attention import NAME
from grpo.models.logprob_model import use_grpo_attention
from grpo.models.lora import check_quantization
from grpo.models.mixers import use_grpo_mixers

disable_progress_bar()  # "Loading weights 38/38" would interrupt our own log


class Float32Head(nn.Linear):
    """The output head, always in float32: logits rounded to bfloat16 put an error of 1e-2 on every logprob."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


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
    model = load_model(path, config, device)
    return model, config.attn_implementation == NAME and use_grpo_attention(model)


def empty_model(config: PretrainedConfig, path: str) -> PreTrainedModel:
    """Create the model of `config` with parameters on the meta device. Buffers have memory: RoPE's are in no file."""
    attention = config._attn_implementation
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, attn_implementation="sdpa")
    model.tie_weights()  # on the meta device, each name got a parameter of its own
    model.set_attn_implementation(attention)
    use_grpo_mixers(model)
    return prepare_model(model, path)


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
    path = plain_model(path, config.gguf_file if config else None)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        hint = "copy it again, or save the model again"
        if (Path(path) / "adapter_config.json").is_file():
            hint = "it holds an adapter; merge it: python launch/export.py --run RUN --format merged"
        raise ConfigError(f"model.name '{path}' cannot be loaded: the folder holds no config.json: {hint}")
    extra: dict[str, object] = {}
    dtype, attention = torch.float32, "sdpa"
    if config is not None:
        if config.attn_implementation != NAME:  # packed attention replaces sdpa later, if a probe finds it exact
            attention = config.attn_implementation
        dtype = getattr(torch, config.torch_dtype)
        if config.load_in_4bit:
            check_quantization()
            from transformers import BitsAndBytesConfig

            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            extra["device_map"] = {"": device or torch.device("cpu")}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, trust_remote_code=False, **extra
        )
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
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return prepare_model(model, path)


def prepare_model(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Set every dropout to 0, so that sampling and training see one policy, and put the output head in float32.

    Raises:
        ConfigError: The model transforms its logits in a way that the logprobs do not support.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(f"model.name '{path}': the output head has a bias, which the chunked logprobs do not support")
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, key, None) not in (None, 1.0):
            raise ConfigError(f"model.name '{path}': config.{key} changes the logits in a way that is not supported")
    if type(head) is nn.Linear:
        float32_head = Float32Head(head.in_features, head.out_features, bias=False, device="meta")
        float32_head.weight = head.weight  # the same parameter: a tied head stays tied
        model.set_output_embeddings(float32_head.train(head.training))
    return model.eval()
