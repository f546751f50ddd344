"""vLLM as the rollout engine. rollout.vllm_mode selects the process that it runs in.

    server      a process and an environment of its own, on other GPUs or another machine: launch/vllm_server.py.
                Every rank sends its own prompts, and vLLM batches them. The main rank sends the weights.
    colocate    in the trainer's process, on the trainer's device. The trainer's environment must have vLLM.

In both modes, token ids go in, and sampled ids and their logprobs after the temperature come out. The seed of a sample
depends only on (seed, draw, sample). After every step the weights are sent and the prefix cache is cleared.

A failure is raised in `generate`, on every rank at the same time, and again in every later call. No step is therefore
interrupted between its samples and its update, and the trained weights can be saved.
"""

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config, RolloutConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.engine import (
    RolloutEngine,
    completion_text,
    end_token_ids,
    hidden_token_ids,
    longest_of,
    register_engine,
)
from grpo.rollout.sampling import stream_key
from grpo.runtime.device import collective_backend, is_cpu
from grpo.runtime.distributed import max_over_ranks
from grpo.types import Completion, Group, Prompt, SamplingPlan

INSTALL = "docs/vllm.md has the install lines for GPU and CPU"
PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with every request. Otherwise the model's generation_config.json would apply (Qwen's has top_k 20 and a
penalty)."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Function that iterates over all weights, merged and unsharded. Collective if they are sharded."""
Request = tuple[Prompt, dict[str, Any]]
"""A prompt and its SamplingParams."""
Sample = tuple[list[int], list[float]]
"""Token ids and their logprobs."""


@register_engine("vllm")
class VLLMEngine(RolloutEngine):
    """Engine for both values of rollout.vllm_mode. It handles seeds, results and failures; a backend does the
    sampling.
    """

    has_own_weights = True
    supports_staleness = False
    default_correction = "truncate"  # vLLM rounds differently from the trainer

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: RolloutConfig,
        accelerator: Accelerator,
        weights: Weights,
        longest: int | None = None,
    ):
        self.tokenizer, self.accelerator, self.weights = tokenizer, accelerator, weights
        self.end_ids = end_token_ids(model, tokenizer)
        self.hidden_ids = hidden_token_ids(self.end_ids, tokenizer)
        self.failure: EngineError | None = None
        backend = ServerBackend if config.vllm_mode == "server" else ColocatedBackend
        self.backend: ServerBackend | ColocatedBackend = backend(model, config, accelerator, longest)

    @classmethod
    def check_environment(cls, config: Config, processes: int) -> None:
        """Raise ConfigError if the server or vLLM is missing or cannot serve this run."""
        rollout = config.rollout
        if rollout.vllm_mode == "server":
            from grpo.rollout.vllm_client import Server, check_server

            check_server(Server(server_url(rollout), rollout.vllm_server_timeout), longest_of(config))
            return
        vllm_module()
        if processes > 1:
            raise ConfigError(
                f"rollout.vllm_mode colocate runs in one process, {processes} were started: use --rollout.vllm_mode "
                f"server, which any number of processes can share"
            )

    def update_weights(self, step: int) -> None:
        """Send the weights. Collective if they are sharded.

        An error is stored and raised by the next `generate`.
        """
        weights = self.weights()
        if self.failure is None:
            try:
                self.backend.send(weights, step)
            except EngineError as error:
                self.failure = error
        for _ in weights:  # every rank must take part in gathering shards, also after an error or if it sends nothing
            pass

    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """Sample completions. Collective. See RolloutEngine.generate.

        Raises:
            EngineError: the engine of any rank failed, now or in an earlier call.
        """
        self._fail_together()
        groups: list[Group] = []
        try:
            requests = [(prompt, self._settings(prompt, plan)) for prompt in prompts]
            samples = self.backend.generate(requests) if requests else []
            groups = [self._group(prompt, found, plan) for prompt, found in zip(prompts, samples, strict=True)]
        except EngineError as error:
            self.failure = error
        self._fail_together()
        if finished is not None:
            for group in groups:
                finished(group)
        return groups

    def _fail_together(self) -> None:
        """Raise EngineError on every rank if the engine of any rank failed. Collective."""
        if max_over_ranks(self.accelerator, self.failure is not None):
            self.failure = self.failure or EngineError("the vLLM engine of another process failed")
            raise self.failure

    def _settings(self, prompt: Prompt, plan: SamplingPlan) -> dict[str, Any]:
        """Return the SamplingParams of a prompt.

        For the n samples of a prompt, vLLM adds 0, 1, 2, ... to the seed.
        """
        return PLAIN | {
            "n": 1 if plan.temperature == 0 else plan.num_generations,  # greedy completions are identical
            "seed": stream_key(plan.seed, prompt.draw, 0) >> 1,
            "temperature": plan.temperature,
            "max_tokens": plan.max_completion_length,
            "logprobs": 0,  # for the sampled token only
            "stop_token_ids": self.end_ids,
            "ignore_eos": True,  # the tokenizer's end token, which may not be in end_ids
        }

    def _group(self, prompt: Prompt, samples: list[Sample], plan: SamplingPlan) -> Group:
        """Check and decode the samples of a prompt.

        Raises:
            EngineError: the number of samples is wrong, or one has missing logprobs or was stopped by something else
                than an end token or the length limit.
        """
        if plan.temperature == 0:
            samples = samples * plan.num_generations
        if len(samples) != plan.num_generations:
            raise EngineError(f"vLLM gave {len(samples)} completions of a prompt, not {plan.num_generations}")
        completions = []
        for ids, logprobs in samples:
            ended = bool(ids) and ids[-1] in self.end_ids
            if len(ids) != len(logprobs) or not (ended or len(ids) == plan.max_completion_length):
                raise EngineError(
                    f"vLLM gave {len(ids)} of {plan.max_completion_length} tokens with {len(logprobs)} logprobs, and "
                    f"no end token ({self.end_ids}): something else stops it. Start the server with "
                    "launch/vllm_server.py"
                )
            text = completion_text(ids, self.hidden_ids, self.tokenizer)
            completions.append(Completion(ids, logprobs, ended, text))
        return Group(prompt, completions)


class ServerBackend:
    """Backend for a vLLM server in another process or on another machine."""

    def __init__(
        self, model: PreTrainedModel, config: RolloutConfig, accelerator: Accelerator, longest: int | None
    ) -> None:
        """Connect to the server.

        Raises:
            ConfigError: it cannot be reached, or cannot serve this run.
        """
        from grpo.rollout.vllm_client import Server, WeightSender, check_server

        self.server = Server(server_url(config), config.vllm_server_timeout)
        self.served = check_server(self.server, longest)
        self.run = broadcast_object_list([uuid.uuid4().hex[:8]])[0]
        self.updates = itertools.count()
        self.version = ""
        self.sender = None
        if accelerator.is_main_process:
            transport = config.vllm_weight_transfer
            if transport == "auto":
                transport = collective_backend(accelerator.device)
            self.sender = WeightSender(self.server, transport, accelerator.device, config.vllm_group_port)

    def send(self, weights: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Send all weights from the main process. Raises EngineError."""
        self.version = f"{self.run}-{next(self.updates)}-step-{step}"
        if self.sender is not None:
            self.sender.send(weights, self.version)

    def generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Return the samples of each prompt.

        Raises:
            EngineError: a request failed, a prompt was changed, or another run sent weights.
        """
        from grpo.rollout.vllm_client import check_version

        check_version(self.server, self.version)
        bodies = [
            settings | {"model": self.served, "prompt": list(prompt.token_ids), "return_token_ids": True}
            for prompt, settings in requests
        ]
        found = []
        for (prompt, _), answer in zip(requests, self.server.ask_all("/v1/completions", bodies), strict=True):
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if choices[0]["prompt_token_ids"] != list(prompt.token_ids):
                raise EngineError("the vLLM server changed a prompt before it completed it: it must not truncate")
            found.append([(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices])
        check_version(self.server, self.version)  # no other run has sent weights since
        return found


class ColocatedBackend:
    """Backend for vLLM in this process. It reserves the share vllm_gpu_memory_utilization of the device's memory."""

    def __init__(
        self, model: PreTrainedModel, config: RolloutConfig, accelerator: Accelerator, longest: int | None
    ) -> None:
        """Start vLLM with space for `longest` tokens.

        Raises:
            ConfigError: vLLM cannot load the model.
        """
        from grpo.rollout.vllm_worker import register

        LLM = vllm_module().LLM
        register()
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
                max_num_seqs=config.slots,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                enforce_eager=is_cpu(accelerator.device),
                skip_tokenizer_init=True,
                worker_extension_cls="grpo.rollout.vllm_worker.Extension",
                seed=0,
            )
        except Exception as error:
            raise ConfigError(f"vLLM cannot load {path} in this process: {error!r}. {INSTALL}") from error

    def send(self, weights: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Load all weights by reference. Raises EngineError."""
        from grpo.rollout.vllm_client import forget_prefixes

        try:
            self.llm.collective_rpc("load_plain_weights", args=(weights,))
            forget_prefixes(self.llm.reset_prefix_cache)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM did not take the weights after step {step}: {error!r}") from error

    def generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Return the samples of each prompt. Raises EngineError."""
        SamplingParams = vllm_module().SamplingParams
        params = [SamplingParams(**settings, detokenize=False) for _, settings in requests]
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in requests]
        try:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"vLLM failed in this process: {error!r}") from error
        found = []
        for output in outputs:
            samples: list[Sample] = []
            for one in sorted(output.outputs, key=lambda one: one.index):
                ids = list(one.token_ids)
                scores = [entry[token].logprob for entry, token in zip(one.logprobs, ids, strict=True)]
                samples.append((ids, scores))
            found.append(samples)
        return found


def server_url(config: RolloutConfig) -> str:
    """Return the address of the server: vllm_server_base_url, or host and port."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


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
