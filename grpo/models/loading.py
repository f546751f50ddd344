"""Loading: a folder or hub id -> a causal LM as training wants it, and its tokenizer.

Every process reads the weights for itself; or, where the model is about to be sharded (FSDP2), the main process for all of
them, and the others make the same model without memory (grpo/models/strategies/fsdp.py hands out the shards).
"""

from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from grpo.config.schema import ModelConfig
from grpo.data.tokenizer import _check_there
from grpo.errors import ConfigError
from grpo.kernels.attention import NAME
from grpo.models.logprob_model import use_grpo_attention
from grpo.models.lora import check_quantization
from grpo.models.weights import Float32Head

disable_progress_bar()  # "Loading weights 38/38": noise between our own lines


def load_to_train(
    path: str, config: ModelConfig, accelerator: Accelerator, *, once: bool
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether our attention was switched on in it. It is on the device of this process; if read `once`, its
    parameters are on the CPU of the main process, and on the meta device of the others. Collective then: what the main process
    cannot read is every process's ConfigError."""

    def read() -> tuple[PreTrainedModel, bool]:
        model = load_model(path, config, accelerator.device)
        return model, config.attn_implementation == NAME and use_grpo_attention(model)

    if not once:
        model, uses_packed_attention = read()
        return model.to(accelerator.device), uses_packed_attention
    found: tuple[PretrainedConfig, GenerationConfig | None, bool] | ConfigError | None = None
    if accelerator.is_main_process:
        try:
            model, uses_packed_attention = read()
            found = (model.config, model.generation_config, uses_packed_attention)
        except ConfigError as error:
            found = error
    [found] = broadcast_object_list([found])
    if isinstance(found, ConfigError):
        raise found
    assert found is not None
    if not accelerator.is_main_process:
        settings, generation, uses_packed_attention = found
        model = ready(outline(settings), path)
        model.generation_config = generation  # type: ignore[assignment]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(accelerator.device)
    return model, uses_packed_attention


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config`, its parameters without memory. Its buffers are real: RoPE's frequencies are in no file."""
    attention = config._attn_implementation
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, attn_implementation="sdpa")
    model.tie_weights()  # without memory, each name got a parameter of its own
    model.set_attn_implementation(attention)
    return model


def load_model(path: str, config: ModelConfig | None = None, device: torch.device | None = None) -> PreTrainedModel:
    """A causal LM with every dropout 0, so that sampling and scoring see one and the same policy; its head in float32.

    float32 weights and the model's own sdpa attention, unless `config` says otherwise (torch_dtype, attn_implementation,
    load_in_4bit, gguf_file).
    """
    _check_there(path)
    if Path(path).is_dir() and not (config and config.gguf_file) and not (Path(path) / "config.json").is_file():
        hint = "copy it again, or save the model again"
        if (Path(path) / "adapter_config.json").is_file():
            hint = "it holds an adapter; merge it: python launch/export.py --run RUN --format merged"
        raise ConfigError(f"model.name '{path}' cannot be loaded: the folder holds no config.json: {hint}")
    extra: dict[str, object] = {}
    dtype, attention = torch.float32, "sdpa"
    if config is not None:
        if config.attn_implementation != NAME:  # ours takes the place of sdpa later, if a probe finds it exact
            attention = config.attn_implementation
        dtype = getattr(torch, config.torch_dtype)
        if config.gguf_file:
            extra["gguf_file"] = config.gguf_file
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
            f"model.name '{path}' cannot be loaded: a weight file is damaged or was copied in part ({error}): copy it again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # out of memory, say
            raise
        raise ConfigError(
            f"model.name '{path}' cannot be loaded: its weights have other shapes than its config.json says: the files are "
            f"of two models"
        ) from error
    if extra.get("gguf_file"):  # plain float32 weights by now, though transformers still calls the model quantized
        model.is_quantized = False  # type: ignore[assignment]
        model.hf_quantizer = None  # type: ignore[assignment]
        del model.config.quantization_config
    return ready(model, path)


def ready(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Every dropout 0, the head in float32. Raises ConfigError for a model whose logprobs we would get wrong."""
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
        head.__class__ = Float32Head
    return model.eval()
