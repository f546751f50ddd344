"""Fakes with the real interface: a tiny random model and a tokenizer whose ids are characters. No download."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from grpo.kernels.attention import NAME, PackedLayout
from grpo.kernels.cuda import varlen
from grpo.models.logprob_model import use_grpo_attention
from grpo.types import Completion, Group, Prompt

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "smollm3": SmolLM3Config,
    "gemma3": Gemma3TextConfig,
}


def tiny_model(family: str = "qwen2", seed: int = 0, spread: float = 4.0, **changes: object) -> PreTrainedModel:
    """A random model with packed attention, whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = FAMILIES[family](**(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread if parameter.ndim > 1 else 1.0)
    assert use_grpo_attention(model)
    assert model.config._attn_implementation == NAME
    return model


class CharTokenizer:
    """Token id 10 is "a", 11 is "b", ...; 0 ends, 1 pads."""

    eos_token_id = 0
    pad_token_id = 1
    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i - 10) if i >= 10 else "?" for i in ids if i > 1 or not skip_special_tokens)


def group(draw: int, prompt: list[int], completions: list[list[int]], ended: bool = True) -> Group:
    """Return a group made of token ids, with sampling logprobs of -1."""
    made = [Completion(ids, [-1.0] * len(ids), ended, "") for ids in completions]
    return Group(Prompt(draw, "text", tuple(prompt)), made)


def save_tokenizer(path: Path) -> int:
    """Save a tokenizer of single characters. Returns the size of its vocabulary."""
    characters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789 +=?")
    vocabulary = {"<end>": 0, "<pad>": 1} | {character: 2 + i for i, character in enumerate(characters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="?")
    tokenizer.save_pretrained(path)
    return len(vocabulary)


def tiny_folder(path: Path, seed: int = 0, **changes: object) -> Path:
    """Save a model folder for `model.name`: a tiny random Qwen2 with a tokenizer of single characters."""
    model = tiny_model(seed=seed, spread=2.0, vocab_size=save_tokenizer(path), **changes)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(path)
    return path


def tiny_data(path: Path, rows: int = 12) -> Path:
    """Write a JSONL file of sums in the format of GSM8K."""
    lines = [
        json.dumps({"question": f"{a}+{a + 1}=", "answer": f"sum\n#### {2 * a + 1}", "pair_id": a}) for a in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def slow_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand-in on a CPU for `torch.nn.attention.varlen.varlen_attn` with a causal mask: one sequence at a time."""
    assert window_size[1] == 0 and query_starts.dtype == key_starts.dtype == torch.int32
    queries, keys, values = (
        torch.tensor_split(tensor, starts[1:-1].tolist())
        for tensor, starts in ((query, query_starts), (key, key_starts), (value, key_starts))
    )
    assert longest == max(map(len, queries)) and longest_keys == max(map(len, keys))
    assert enable_gqa == (query.shape[1] != key.shape[1]) or not varlen.SHARED_KEYS
    results = []
    for own, its_keys, its_values in zip(queries, keys, values, strict=True):
        repeats = query.shape[1] // key.shape[1]
        its_keys, its_values = (part.repeat_interleave(repeats, dim=1) for part in (its_keys, its_values))
        scores = torch.einsum("qhd,khd->hqk", own, its_keys) * (scale or query.shape[-1] ** -0.5)
        place = torch.arange(len(own))[:, None] + len(its_keys) - len(own)
        distance = place - torch.arange(len(its_keys))
        hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
        results.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), its_values))
    return torch.cat(results)


def use_slow_varlen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let packed attention take the path of 16-bit CUDA on a CPU in float32.

    Returns:
        A list that gets the number of sequences of each call.
    """
    calls: list[int] = []
    signature = inspect.signature(varlen_attn)

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[3]) - 1)
        signature.bind(*args, **kwargs)  # torch has all arguments
        return slow_varlen_attn(*args, **kwargs)

    monkeypatch.setattr(PackedLayout, "uses_varlen", True)
    monkeypatch.setattr(varlen, "is_supported", lambda query, value: True)
    monkeypatch.setattr(varlen, "varlen_attn", attend)
    return calls
