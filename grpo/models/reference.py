"""Reference policies of the KL: a packed batch -> logprobs [N] without gradient.

FrozenReference     a copy of the initial weights, or another model with the same vocabulary (model.reference).
                    `sync` moves it towards the policy (model.sync_ref_model)
AdapterReference    the policy without its LoRA adapter, or with that adapter's first weights: no model of its own
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.kernels.transfer import on_host, to_device
from grpo.models.lora import Adapter, adapter_disabled
from grpo.packing import PackedBatch


class FrozenReference:
    """A model of its own that takes no gradient.

    Args:
        logprob_model: The model, as a `LogprobModel`.
        device: The device that computes.
        offload: Keep the weights on the CPU between calls.
    """

    def __init__(self, logprob_model: nn.Module, device: torch.device, *, offload: bool = False) -> None:
        self.logprob_model, self.device, self.offload = logprob_model, device, offload
        logprob_model.requires_grad_(False).eval()
        if offload:
            for buffer in logprob_model.buffers():
                buffer.data = buffer.data.to(device)
            for parameter in logprob_model.parameters():
                parameter.data = on_host(parameter.data, device)

    @property
    def model(self) -> nn.Module:
        """The causal LM."""
        return self.logprob_model.model  # type: ignore[return-value]

    def logprobs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Return logprobs [N] of each batch. Offloaded weights are moved to the device once for all batches."""
        if not self.offload:
            return detached_logprobs(self.logprob_model, batches)
        parameters = list(self.logprob_model.parameters())
        on_cpu = [parameter.data for parameter in parameters]
        try:
            for parameter, tensor in zip(parameters, on_cpu, strict=True):
                parameter.data = to_device(tensor, self.device)
            return detached_logprobs(self.logprob_model, batches)
        finally:  # they were only read: nothing is copied back
            for parameter, tensor in zip(parameters, on_cpu, strict=True):
                parameter.data = tensor

    @torch.no_grad()
    def sync(self, policy_weights: Iterable[tuple[str, Tensor]], alpha: float) -> None:
        """Set reference <- alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656, eq. 4)."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in policy_weights:
            if name not in parameters:  # a buffer: the policy does not train it
                continue
            parameters[name].lerp_(tensor.to(parameters[name].device), alpha)


class AdapterReference:
    """The policy with its adapter disabled, or as that adapter was at first: exactly the model before training.

    Args:
        logprob_model: The policy's own `LogprobModel`, wrapped.
        adapter: The adapter in it.
        is_given: The adapter was trained before, and the reference has its weights of now.
    """

    def __init__(self, logprob_model: nn.Module, adapter: Adapter, *, is_given: bool = False) -> None:
        self.logprob_model, self.adapter = logprob_model, adapter
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad] if is_given else []
        self.first = [(parameter, parameter.detach().clone()) for parameter in trained]

    def logprobs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Return logprobs [N] of each batch."""
        with self._first_weights() if self.first else adapter_disabled(self.adapter):
            return detached_logprobs(self.logprob_model, batches)

    @contextlib.contextmanager
    def _first_weights(self) -> Iterator[None]:
        now = [parameter.detach().clone() for parameter, _ in self.first]
        try:
            for parameter, tensor in self.first:
                parameter.data.copy_(tensor)
            yield
        finally:
            for (parameter, _), tensor in zip(self.first, now, strict=True):
                parameter.data.copy_(tensor)


def detached_logprobs(logprob_model: nn.Module, batches: list[PackedBatch]) -> list[Tensor]:
    """Return logprobs [N] of each batch, without a gradient."""
    return [logprobs for logprobs, _ in detached_outputs(logprob_model, batches)]


@torch.no_grad()
def detached_outputs(logprob_model: nn.Module, batches: list[PackedBatch]) -> list[tuple[Tensor, Tensor]]:
    """Return logprobs and entropies [N] of each batch, without a gradient."""
    # In reverse: the last batch of a split group has the prompt in its row (grpo/models/shared_prompt.py).
    return [logprob_model(batch) for batch in reversed(batches)][::-1]


def check_vocabulary(
    policy_size: int,
    reference_size: int,
    policy: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Check that token ids mean the same to policy and reference.

    Raises:
        ConfigError: The vocabularies differ in size or in a token's id.
    """
    if reference_size != policy_size:
        raise ConfigError(
            f"model.reference '{name}' has a vocabulary of {reference_size}, the policy one of {policy_size}: a KL "
            f"between them means nothing. Use a reference with the same tokenizer"
        )
    mine, theirs = policy.get_vocab(), reference.get_vocab()
    different = [token for token, index in mine.items() if theirs.get(token) != index]
    if different:
        token = min(different, key=lambda token: mine[token])
        raise ConfigError(
            f"model.reference '{name}' numbers {len(different)} tokens differently ({token!r} is {mine[token]} for the "
            f"policy, {theirs.get(token)} for the reference): a KL between them means nothing. Use a reference with "
            f"the same tokenizer"
        )
