"""vLLM as the rollout engine. rollout.vllm_mode selects the process that it runs in.

    server      a process and an environment of its own, on other GPUs or another machine: launch/vllm_server.py.
                Every rank sends its own prompts, and vLLM batches them. The main rank sends the weights.
    colocate    in the trainer's processes, on their devices (grpo/rollout/vllm_colocate.py). The trainer's environment
                must have vLLM.

In both modes, token ids go in, and sampled ids and their logprobs after the temperature come out. The seed of a sample
depends only on (seed, draw, sample). After every step the weights are sent and the prefix cache is cleared.

A failure is raised in `generate`, on every rank at the same time, and again in every later call. No step is therefore
interrupted between its samples and its update, and the trained weights can be saved.
"""

import itertools
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
from grpo.rollout.vllm_colocate import ColocatedBackend, Request, Sample, check_colocation
from grpo.runtime.device import collective_backend
from grpo.runtime.distributed import Agreement, timeout_of
from grpo.types import Completion, Group, Prompt, SamplingPlan

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


@register_engine("vllm")
class VLLMEngine(RolloutEngine):
    """Engine for both values of rollout.vllm_mode. It handles seeds, results and failures; a backend does the
    sampling.
    """

    has_own_weights = True
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
        # Its own group: with max_staleness, `generate` runs in a thread beside the collectives of training.
        self.agreement = Agreement(timeout_of(accelerator)) if accelerator.num_processes > 1 else None
        backend = ServerBackend if config.vllm_mode == "server" else ColocatedBackend
        self.backend: ServerBackend | ColocatedBackend = backend(model, config, accelerator, longest)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError for settings that the mode does not support."""
        rollout = config.rollout
        if rollout.vllm_mode == "server":
            for key, value, instead in (
                ("vllm_tensor_parallel_size", rollout.vllm_tensor_parallel_size > 1, "--tensor-parallel-size N"),
                ("vllm_enable_sleep_mode", rollout.vllm_enable_sleep_mode, "a GPU of its own"),
            ):
                if value:
                    raise ConfigError(
                        f"rollout.{key} is set, but rollout.vllm_mode is server: leave it out, and start "
                        f"launch/vllm_server.py with {instead}"
                    )
        elif rollout.max_staleness:
            raise ConfigError(
                f"rollout.max_staleness is {rollout.max_staleness}, but with rollout.vllm_mode colocate vLLM samples "
                f"in the process that trains: set it to 0, or vllm_mode to server"
            )

    @classmethod
    def check_environment(cls, config: Config, processes: int) -> None:
        """Raise ConfigError if the server or vLLM is missing or cannot serve this run."""
        rollout = config.rollout
        if rollout.vllm_mode == "server":
            from grpo.rollout.vllm_client import Server, check_server

            check_server(Server(server_url(rollout), rollout.vllm_server_timeout), longest_of(config))
            return
        check_colocation(config, processes)

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
            samples = self.backend.generate(requests)
            groups = [self._group(prompt, found, plan) for prompt, found in zip(prompts, samples, strict=True)]
        except EngineError as error:
            self.failure = error
        self._fail_together()
        if finished is not None:
            for group in groups:
                finished(group)
        return groups

    def free_memory(self) -> None:
        """In sleep mode, free the memory of vLLM until the next `update_weights`."""
        if self.failure is None:
            try:
                self.backend.free_memory()
            except EngineError as error:
                self.failure = error

    def _fail_together(self) -> None:
        """Raise EngineError on every rank if the engine of any rank failed. Collective."""
        if self.agreement is not None and self.agreement.check(self.failure) is not None:
            self.failure = self.failure or EngineError("the vLLM engine of another process failed")
        if self.failure is not None:
            raise self.failure

    def _settings(self, prompt: Prompt, plan: SamplingPlan) -> dict[str, Any]:
        """Return the SamplingParams of a prompt.

        For the n samples of a prompt, vLLM adds 0, 1, 2, ... to the seed.
        """
        return PLAIN | {
            "n": 1 if plan.temperature == 0 else plan.num_generations,  # greedy completions are identical
            "seed": stream_key(plan.seed, prompt.draw, 0) >> 1,
            "temperature": plan.temperature,
            **{name: getattr(plan, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
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

    def free_memory(self) -> None:
        """Do nothing: the server has memory of its own."""

    def generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Return the samples of each prompt.

        Raises:
            EngineError: a request failed, a prompt was changed, or another run sent weights.
        """
        if not requests:
            return []
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


def server_url(config: RolloutConfig) -> str:
    """Return the address of the server: vllm_server_base_url, or host and port."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
