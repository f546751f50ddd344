"""Reference policies: what the KL holds the policy to. A packed batch -> [N] logprobs without gradient.

frozen copy     of the starting weights (the default)
adapter off     with LoRA: the policy itself, its adapter switched off. No memory at all
another model   model.reference: a hub id or folder with the same vocabulary
synced          either of the copies, moved towards the policy every model.ref_model_sync_steps steps
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.models.weights import full_weights
from grpo.packing import PackedBatch


class Reference:
    """`logprob_model` computes the logprobs: a model of its own, or the policy's, used inside `switch` (its adapter off)."""

    def __init__(
        self,
        logprob_model: nn.Module,
        device: torch.device,
        *,
        switch: Callable[[], AbstractContextManager] | None = None,
        offload: bool = False,
    ) -> None:
        self.logprob_model, self.device, self.switch, self.offload = logprob_model, device, switch, offload
        if switch is None:
            logprob_model.requires_grad_(False).eval()
            if offload:
                logprob_model.to("cpu")

    @torch.no_grad()
    def logprobs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """[N] for each batch; the weights travel to the device and back once for all of them."""
        with self._in_use():
            # The last batch of a split group has the prompt in its row: see grpo/models/shared_prompt.py.
            return [self.logprob_model(batch)[0] for batch in reversed(batches)][::-1]

    @property
    def holds_weights(self) -> bool:
        return self.switch is None

    @torch.no_grad()
    def sync(self, policy_model: nn.Module, alpha: float) -> None:
        """reference <- alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656, eq. 4)."""
        assert self.holds_weights
        own = dict(self.model.named_parameters())
        for name, tensor in full_weights(policy_model):
            own[name].lerp_(tensor.to(own[name].device), alpha)

    @property
    def model(self) -> nn.Module:
        return self.logprob_model.model  # type: ignore[return-value]

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        if self.switch is not None:
            with self.switch():
                yield
        elif self.offload:
            self.logprob_model.to(self.device)
            try:
                yield
            finally:
                self.logprob_model.to("cpu")
        else:
            yield


def check_vocabulary(
    policy_size: int,
    reference_size: int,
    policy: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Raise ConfigError unless a token id means the same to both: a KL between different vocabularies means nothing."""
    if reference_size != policy_size:
        raise ConfigError(
            f"model.reference '{name}' has a vocabulary of {reference_size}, the policy one of {policy_size}: a KL between "
            f"them means nothing. Use a reference with the same tokenizer"
        )
    mine, theirs = policy.get_vocab(), reference.get_vocab()
    different = [token for token, index in mine.items() if theirs.get(token) != index]
    if different:
        token = min(different, key=lambda token: mine[token])
        raise ConfigError(
            f"model.reference '{name}' numbers {len(different)} tokens differently ({token!r} is {mine[token]} for the "
            f"policy, {theirs.get(token)} for the reference): a KL between them means nothing. Use a reference with the "
            f"same tokenizer"
        )
