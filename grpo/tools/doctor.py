"""Doctor: is the trainer right on this machine, and how fast is it? -> a table, or a JSON file for a bug report.

On each device that the machine has, and in each precision that it computes in:

    checks    packed attention and its gradients, isolation of groups, the output head, a small model's packed logprobs
              and gradients against its own modules, the sampler's logprobs against the trainer's
    rates     matrix products, memory bandwidth, and from a model of a fixed size ms per decoding step and per update,
              beside the least that those rates allow
"""

import argparse
import functools
import importlib.metadata
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from grpo.kernels import self_test
from grpo.kernels.registry import report
from grpo.models.logprob_model import LogprobModel, probe_batch, run_self_test, use_grpo_attention
from grpo.packing import PackedBatch, pack
from grpo.rollout.engine import build_engine
from grpo.runtime.device import (
    attention_off,
    configure,
    describe_devices,
    device_kind,
    free_memory,
    has_bfloat16,
    is_cpu,
    library_versions,
    synchronize,
)
from grpo.runtime.precision import PRECISIONS
from grpo.types import Completion, Group, Prompt, SamplingPlan

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "peft", "vllm", "deepspeed", "bitsandbytes", "trl")
HEADS = (8, 2, 64)
VOCABULARY = 4096
ROWS, COMPLETION = 32, 64
"""Completions that the timed decoding steps sample at a time, and their tokens."""
UPDATE_TOKENS = {"cpu": 2048}
UPDATE_TOKENS_ELSEWHERE = 16384


def main(argv: list[str]) -> None:
    """Run `grpo doctor`. Exits with code 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="grpo doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--quick", action="store_true", help="checks only, no rates")
    flags = parser.parse_args(argv)
    found = examine(rates=not flags.quick)
    print("\n".join(lines(found)))
    if flags.output is not None:
        flags.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not found["ok"]:
        raise SystemExit(1)


def examine(*, rates: bool = True) -> dict[str, Any]:
    """Return versions, devices, and for each device and precision the checks and rates."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu") if device is None else torch.device(device.type, 0)
    configure(device)
    precisions = [dtype for dtype in PRECISIONS if _computes_in(dtype, device)]
    results = {str(dtype).removeprefix("torch."): _examine(device, dtype, rates) for dtype in precisions}
    checks = [check for result in results.values() for check in result["checks"].values()]
    return {
        "ok": all(check["ok"] for check in checks),
        "versions": {"python": platform.python_version(), "platform": platform.platform(), **_versions()},
        "device": device_kind(device),
        "devices": describe_devices(),
        "free_gib": round(free_memory(device) / 2**30, 1),
        "threads": torch.get_num_threads(),
        "precisions": results,
        "kernels": report(device.type),
        "off": _off(device),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the result of `examine` as text."""
    shown = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    shown += [f"{found['device']}: {', '.join(found['devices'])}; {found['free_gib']} GiB free", found["kernels"]]
    shown += [f"off: {name}: {reason}" for name, reason in found["off"].items()]
    for name, result in found["precisions"].items():
        for what, check in result["checks"].items():
            value = check.get("error", f"{check.get('value', 0):.2g} (at most {check.get('limit', 0):g})")
            shown.append(f"{'ok    ' if check['ok'] else 'FAILED'} {name:9} {what}: {value}")
        shown += [f"       {name:9} {what}: {value:.4g}" for what, value in result["rates"].items()]
    shown.append("all checks passed" if found["ok"] else "checks FAILED: attach the file of --output to a bug report")
    return shown


def _versions() -> dict[str, str]:
    """Return the versions of the installed packages that matter, and of CUDA and its libraries."""
    found = library_versions()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _off(device: torch.device) -> dict[str, str]:
    """Return what is not used on this machine beside kernels, and why."""
    off = {}
    if is_cpu(device) and torch.version.cuda is not None:
        off["GPU"] = (
            f"torch is built for CUDA {torch.version.cuda}, but finds no GPU; nvidia-smi says if the driver does"
        )
    elif is_cpu(device) and shutil.which("nvidia-smi"):
        off["GPU"] = f"torch {torch.__version__} is built without CUDA: pip install torch from another index"
    if not is_cpu(device) and not has_bfloat16(device):
        off["bfloat16"] = "this GPU does not compute in it: mixed_precision fp16"
    off.update({f"attention of {name}": reason for name, reason in attention_off(device).items()})
    if torch.get_float32_matmul_precision() != "highest":
        off["float32 products"] = f"at precision {torch.get_float32_matmul_precision()}, as this program has set it"
    return off


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the trainer supports `dtype` on `device`."""
    if dtype == torch.float16:
        return not is_cpu(device)
    return dtype == torch.float32 or has_bfloat16(device)


def _examine(device: torch.device, dtype: torch.dtype, rates: bool) -> dict[str, Any]:
    """Return checks and rates of one precision."""
    model = _model(device)
    run_self_test(model, None if dtype == torch.float32 else dtype)
    precision = PRECISIONS[dtype]
    wide = dtype == torch.float32
    limits: dict[str, tuple[Callable[[], float], float]] = {
        "packed attention, result and gradients": (
            lambda: self_test.attention_error(HEADS, device, dtype),
            1e-4 if wide else precision.hidden,
        ),
        "tokens of another group change nothing": (lambda: self_test.attention_leak(HEADS, device, dtype), 0.0),
        "RMSNorm, result and gradients": (
            lambda: self_test.norm_error(HEADS[0] * HEADS[2], device, dtype),
            1e-4 if wide else precision.hidden,
        ),
        "output head, logprobs and gradients": (
            lambda: self_test.head_error(VOCABULARY, device, dtype),
            1e-4 if wide else precision.hidden,
        ),
        "packed logprobs against the model's own": (lambda: _packed_error(model, dtype), precision.logprob),
        "gradient norm against the model's own": (lambda: _gradient_error(model, dtype), precision.hidden),
        "sampler's logprobs against the trainer's": (lambda: _sampler_error(model, dtype), precision.logprob),
    }
    checks = {name: _check(measure, limit) for name, (measure, limit) in limits.items()}
    measured: dict[str, float] = {}
    if rates:
        try:
            measured = _rates(model, device, dtype)
        except Exception as error:
            checks["rates"] = _failure(error)
    return {"checks": checks, "rates": measured}


def _check(measure: Callable[[], float], limit: float) -> dict[str, Any]:
    """Return the result of one check. An error is a failed check, so that the others still run."""
    try:
        value = measure()
    except Exception as error:
        return _failure(error)
    return {"ok": value <= limit, "value": value, "limit": limit}


def _failure(error: Exception) -> dict[str, Any]:
    return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _model(device: torch.device, width: int = 128, layers: int = 2) -> PreTrainedModel:
    """Return a random model, from the same seed each time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval().to(device)
    with torch.no_grad():  # distributions that are far from uniform
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    use_grpo_attention(model)
    return model


def _logprobs(model: PreTrainedModel, batch: PackedBatch, dtype: torch.dtype, *, packed: bool) -> Tensor:
    """Return the logprobs of a batch, computed packed or as padded rows by the model's own attention."""
    model.set_attn_implementation("grpo" if packed else "sdpa")
    logprob_model = LogprobModel(model, uses_packed_attention=packed, temperature=1.0, uses_kernels=packed)
    kind = batch.input_ids_T.device.type
    try:
        with torch.autocast(kind, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
            logprobs: Tensor = logprob_model(batch)[0]
    finally:
        model.set_attn_implementation("grpo")
    return logprobs


def _probe(model: PreTrainedModel) -> PackedBatch:
    return probe_batch(VOCABULARY).to(next(model.parameters()).device)


@torch.no_grad()
def _packed_error(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return the largest difference of packed and padded logprobs, in nats."""
    ours, theirs = (_logprobs(model, _probe(model), dtype, packed=packed) for packed in (True, False))
    return float((ours - theirs).abs().max())


def _gradient_error(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return the relative difference of the gradients of packed and padded logprobs."""
    gradients = []
    for packed in (True, False):
        model.zero_grad()
        _logprobs(model, _probe(model), dtype, packed=packed).sum().backward()
        parts = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients.append(torch.cat([part.flatten() for part in parts]))
    model.zero_grad()
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def _sampler_error(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return the mean difference of the sampler's and the trainer's logprobs of the same tokens, in nats."""
    kind = next(model.parameters()).device.type
    with torch.autocast(kind, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
        groups = _engine(model).generate(_prompts(2), SamplingPlan(4, 24, 1.0, seed=1))
    batch = pack(groups, torch.ones(2, 4), max_tokens=10**6)[0].to(next(model.parameters()).device)
    with torch.no_grad():
        return float((_logprobs(model, batch, dtype, packed=True) - batch.sampling_logprobs_N).abs().mean())


def _engine(model: PreTrainedModel) -> Any:
    tokenizer: Any = SimpleNamespace(eos_token_id=0, pad_token_id=1, bos_token_id=None, decode=lambda ids, **_: "")
    return build_engine("native", model, tokenizer, slots=ROWS, uses_packed_attention=True)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(index, "", tuple(range(3 + index, 3 + index + 16))) for index in range(count)]


def _rates(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the rates of the device, and the times of a decoding step and of an update beside their bounds."""
    cpu = is_cpu(device)
    size = 1024 if cpu else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    flops = 2 * size**3 / _seconds(functools.partial(torch.mm, left, left), device)
    numbers = torch.ones((64 if cpu else 1024) * 2**18, device=device)
    bandwidth = 2 * numbers.nbytes / _seconds(numbers.clone, device)
    del left, numbers
    big = _model(device, width=256 if cpu else 1024, layers=4 if cpu else 16)
    weights = sum(parameter.numel() for parameter in big.parameters())
    kind, autocast = device.type, dtype != torch.float32
    tokens = UPDATE_TOKENS.get(kind, UPDATE_TOKENS_ELSEWHERE)
    batch = _update_batch(tokens).to(device)

    def update() -> None:
        big.zero_grad()
        _logprobs(big, batch, dtype, packed=True).sum().backward()

    update_seconds = _seconds(update, device)
    engine, plan = _engine(big), SamplingPlan(ROWS // 4, COMPLETION, 1.0, seed=0)

    def sample() -> None:
        with torch.autocast(kind, dtype=dtype if autocast else None, enabled=autocast):
            engine.generate(_prompts(4), plan)

    step = _seconds(sample, device) / COMPLETION
    return {
        "matrix products, TFLOP/s": flops / 1e12,
        "memory, GB/s": bandwidth / 1e9,
        "decoding step, ms": 1e3 * step,
        "decoding step, bound in ms": 1e3 * weights * dtype.itemsize / bandwidth,
        f"update of {tokens} tokens, ms": 1e3 * update_seconds,
        f"update of {tokens} tokens, bound in ms": 1e3 * 6 * weights * tokens / flops,
    }


def _update_batch(tokens: int) -> PackedBatch:
    """Return a packed batch of groups of 16 completions, of about `tokens` tokens."""
    completion = Completion([2] * 120, [0.0] * 120, True, "")
    count = max(1, tokens // (16 * 120 + 16))
    groups = [Group(prompt, [completion] * 16) for prompt in _prompts(count)]
    return pack(groups, torch.ones(count, 16), max_tokens=10**9)[0]


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the least seconds of `repeats` runs of `work`, after one that is not counted."""
    best = float("inf")
    for repeat in range(repeats + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - begun)
    return best
