"""vLLM in the trainer's processes: one worker of vLLM in each, on the device of that process.

vllm_tensor_parallel_size 1    every process has an engine of its own for its own prompts
vllm_tensor_parallel_size k    k neighbouring processes share the model; each samples the prompts of all k, and
                               keeps its own. Which process samples what does not change the completions

vllm_enable_sleep_mode         weights, keys and values leave the device before each update. The new weights are
                               loaded when it is done, and memory for keys and values is taken when sampling starts
"""

import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.schema import Config, RolloutConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_client import forget_prefixes
from grpo.runtime.device import empty_cache, is_cpu
from grpo.runtime.distributed import Neighbours
from grpo.types import Prompt

INSTALL = "docs/vllm.md has the install lines for GPU and CPU"

Request = tuple[Prompt, dict[str, Any]]
"""A prompt and its SamplingParams."""
Sample = tuple[list[int], list[float]]
"""Token ids and their logprobs."""


def vllm_module() -> Any:
    """Import vLLM with settings for use in this process.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that weights go by reference
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a CPU only
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine is vllm with vllm_mode colocate, but vLLM is not in this environment: {INSTALL}; or set "
            f"--rollout.vllm_mode server, which needs it only where launch/vllm_server.py runs"
        ) from error
    return vllm


def check_colocation(config: Config, processes: int) -> None:
    """Check the settings of colocate mode against this environment and the number of processes.

    Raises:
        ConfigError: vLLM is missing, or cannot run as configured.
    """
    vllm_module()
    rollout, size = config.rollout, config.rollout.vllm_tensor_parallel_size
    if processes % size:
        raise ConfigError(
            f"rollout.vllm_tensor_parallel_size is {size}, which does not divide the {processes} processes of this "
            f"run: every process holds one part of vLLM's model. Set it to a divisor, or num_processes to a multiple"
        )
    if rollout.vllm_enable_sleep_mode:
        from vllm.platforms import current_platform

        if not current_platform.is_sleep_mode_available():
            raise ConfigError(
                f"rollout.vllm_enable_sleep_mode is true, which vLLM does not support on this device "
                f"({current_platform.device_name}): set it to false"
            )


class ColocatedBackend:
    """Backend for vLLM in this process. It reserves the share vllm_gpu_memory_utilization of the device's memory."""

    def __init__(
        self, model: PreTrainedModel, config: RolloutConfig, accelerator: Accelerator, longest: int | None
    ) -> None:
        """Start vLLM with space for `longest` tokens. Collective.

        Raises:
            ConfigError: vLLM cannot load the model.
        """
        from grpo.rollout.vllm_worker import register

        LLM = vllm_module().LLM
        register()
        self.device, self.sleeps = accelerator.device, config.vllm_enable_sleep_mode
        self.has_weights = self.has_cache = True
        size = config.vllm_tensor_parallel_size
        self.neighbours = Neighbours(accelerator, size)
        path = model.config._name_or_path
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
        try:
            self.llm = LLM(
                path,
                dtype=dtype,
                load_format="dummy",  # the trainer sends its weights before the first token is sampled
                hf_overrides={"head_dtype": "float32"},
                generation_config="vllm",
                logprobs_mode="processed_logprobs",  # after the temperature
                max_model_len=config.vllm_max_model_length or longest,
                max_num_seqs=config.slots * size,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                enable_sleep_mode=self.sleeps,
                enforce_eager=is_cpu(accelerator.device),
                skip_tokenizer_init=True,
                worker_extension_cls="grpo.rollout.vllm_worker.Extension",
                seed=0,
                **_processes(accelerator, size),
            )
        except Exception as error:
            raise ConfigError(f"vLLM cannot load {path} in this process: {error!r}. {INSTALL}") from error

    def send(self, weights: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Load all weights by reference. Raises EngineError."""
        try:
            if not self.has_weights:
                empty_cache(self.device)  # vLLM takes memory from the device, not from torch's allocator
                self.llm.wake_up(tags=["weights"])
                self.has_weights = True
            self.llm.collective_rpc("load_plain_weights", args=(weights,))
            forget_prefixes(self.llm.reset_prefix_cache)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM did not take the weights after step {step}: {error!r}") from error

    def free_memory(self) -> None:
        """Drop weights, keys and values until `send` and `generate`, in sleep mode. Raises EngineError."""
        if not self.sleeps or not self.has_weights:
            return
        self.has_weights = self.has_cache = False
        try:
            self.llm.sleep(level=2)  # 1 would copy the weights to the machine's memory, but new ones will be sent
        except Exception as error:
            raise EngineError(f"vLLM did not free its memory: {error!r}") from error

    def generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Return the samples of each prompt. Collective with tensor parallelism. Raises EngineError."""
        everyone, first = self.neighbours.gather(requests)
        if not everyone:
            return []
        SamplingParams = vllm_module().SamplingParams
        params = [SamplingParams(**settings, detokenize=False) for _, settings in everyone]
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in everyone]
        try:
            if not self.has_cache:
                empty_cache(self.device)
                self.llm.wake_up(tags=["kv_cache"])
                self.has_cache = True
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"vLLM failed in this process: {error!r}") from error
        return [_samples(output) for output in outputs[first : first + len(requests)]]


def _processes(accelerator: Accelerator, size: int) -> dict[str, Any]:
    """Return the arguments that tell vLLM of the processes of this run, each of which is one of its workers."""
    if accelerator.num_processes == 1:
        return {}
    for name, value in (
        ("RANK", accelerator.process_index),
        ("LOCAL_RANK", accelerator.local_process_index),
        ("WORLD_SIZE", accelerator.num_processes),
    ):
        os.environ[name] = str(value)
    return {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}


def _samples(output: Any) -> list[Sample]:
    samples: list[Sample] = []
    for one in sorted(output.outputs, key=lambda one: one.index):
        ids = list(one.token_ids)
        samples.append((ids, [entry[token].logprob for entry, token in zip(one.logprobs, ids, strict=True)]))
    return samples
