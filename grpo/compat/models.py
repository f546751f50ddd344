"""The model of a GRPOTrainer: an id, a folder or a loaded model -> what `model.name` names, and the model in memory."""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, PreTrainedModel

from grpo.data.gguf import plain_model
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.given_adapter import GivenAdapter

SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""Entries of a config that make two models alike."""


@dataclass(frozen=True)
class GivenModel:
    """The model that is trained."""

    path: str
    """Its id or folder. Of a loaded model: where its config and tokenizer are."""
    live: PreTrainedModel | None
    """The loaded model, which is trained in place; None: the weights in `path`."""
    tokenizer: Any
    model_type: str
    adapter: GivenAdapter | None = None
    """The adapter that the loaded model has, which is trained on."""


def given_model(model: Any, tokenizer: Any, remarks: list[str]) -> GivenModel:
    """Return what is trained.

    Args:
        model: A name, or a loaded model.
        tokenizer: processing_class; None: that of the model.
        remarks: Gets a line where the weights are converted.

    Raises:
        ConfigError: It is no model for text, or has several adapters.
    """
    if tokenizer is not None and hasattr(tokenizer, "tokenizer"):
        raise ConfigError("processing_class is a processor for images or sound, needs to be a tokenizer")
    if isinstance(model, str | os.PathLike):
        path = str(model)
        tokenizer = _left_padded(tokenizer) or load_tokenizer(path)
        return GivenModel(path, None, tokenizer, _config_of(path).model_type)
    adapter = _adapter_of(model) if hasattr(model, "peft_config") else None
    if adapter is not None:
        model = adapter.base
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model is a {type(model).__name__}, needs to be a name or a transformers.PreTrainedModel")
    path = str(model.config._name_or_path or "")
    if tokenizer is None and not path:
        raise ConfigError("processing_class is missing: a model that was made from a config has no tokenizer: pass one")
    tokenizer = _left_padded(tokenizer) or load_tokenizer(path)
    if model.dtype != torch.float32:
        remarks.append(
            f"the model was loaded in {str(model.dtype).removeprefix('torch.')}: its weights are trained in float32, "
            f"since an update of 1e-6 is lost in the rounding of 16 bits; bf16=True computes in bfloat16"
        )
        model.float()
    if not path or not _is_config_of(path, model):
        path = scratch_folder()
        model.config.save_pretrained(path)
    return GivenModel(path, model, tokenizer, model.config.model_type, adapter)


def _adapter_of(model: Any) -> GivenAdapter:
    """Return the adapter of a peft.PeftModel."""
    names = list(model.peft_config)
    if len(names) != 1 or not hasattr(model, "get_base_model"):
        raise ConfigError(
            f"model has the adapters {names}, needs to be a base model or a peft.PeftModel with one adapter: merge the "
            f"others (merge_and_unload)"
        )
    return GivenAdapter(model, names[0])


def _left_padded(tokenizer: Any) -> Any:
    if tokenizer is not None:
        tokenizer.padding_side = "left"
    return tokenizer


def _config_of(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(plain_model(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model '{path}' cannot be loaded: {error}") from error


def _is_config_of(path: str, model: PreTrainedModel) -> bool:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return all(getattr(config, name, None) == getattr(model.config, name, None) for name in SAME)


@contextlib.contextmanager
def launch_environment(precision: str, use_cpu: bool) -> Iterator[None]:
    """Set the mixed precision and the device of the Accelerator that is created within, as TrainingArguments does.

    A run with another precision earlier in this process is over: its state of accelerate is dropped.
    """
    changes = {"ACCELERATE_MIXED_PRECISION": precision} | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    before = {name: os.environ.get(name) for name in changes}
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def scratch_folder() -> str:
    """Return a folder for the config of a loaded model, which is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="grpo-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
