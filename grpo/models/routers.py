"""Routers of a mixture of experts: router logits of a step -> load-balancing loss, and the load of the experts.

With E experts, of which a token goes to k, L layers with a router, and the tokens t of all rows that count in the loss
(a prompt counts once for each of its completions):

    f_e   share of the (layer, token) pairs whose k largest logits include expert e
    p_e   mean probability of expert e over these pairs
    loss  E * sum_e f_e p_e              Switch Transformers (arXiv 2101.03961, eq. 4-6); k if all is balanced

Only p_e has a gradient. With f_e of the whole optimizer step, the loss is therefore a sum over batches, and its
gradient depends neither on the packing nor on the number of ranks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from grpo.errors import ConfigError
from grpo.models.architecture import text_config, text_decoder
from grpo.models.lora import ADAPTER_NAME, adapted_parameter, lora_layers
from grpo.packing import PackedBatch
from grpo.runtime.device import widest_float
from grpo.runtime.distributed import sum_over_ranks

COEFFICIENT = "router_aux_loss_coef"
"""Key of the model's config. Families without it are not balanced by a loss."""


@dataclass
class RouterSums:
    """Sums over the tokens of one batch or of several."""

    chosen_LE: Tensor
    """Tokens for which layer l chose expert e."""
    probability_E: Tensor
    """Probability of expert e, summed over layers and tokens."""
    tokens: Tensor
    """Number of tokens."""

    def __add__(self, other: "RouterSums") -> "RouterSums":
        return RouterSums(
            self.chosen_LE + other.chosen_LE, self.probability_E + other.probability_E, self.tokens + other.tokens
        )

    def detached(self) -> "RouterSums":
        """Return the sums without gradient, in float64 where the device has it."""
        wide = widest_float(self.tokens.device)
        return RouterSums(*(value.detach().to(wide) for value in vars(self).values()))

    def flat(self) -> list[float]:
        """Return all numbers."""
        return torch.cat([value.flatten() for value in vars(self).values()]).tolist()

    def like(self, numbers: list[float]) -> "RouterSums":
        """Return `numbers`, which `flat` returned, in the shape of these sums."""
        parts = torch.tensor(numbers, dtype=self.tokens.dtype, device=self.tokens.device).split(
            [value.numel() for value in vars(self).values()]
        )
        return RouterSums(*(part.view_as(value) for part, value in zip(parts, vars(self).values(), strict=True)))


class LoadBalance:
    """Load-balancing loss of a model's routers over one optimizer step, and what the log says of their load.

    Attributes:
        coefficient: Weight of the loss; 0 measures the load only.
        experts_per_token: k.
    """

    def __init__(self, accelerator: Accelerator, coefficient: float, experts_per_token: int) -> None:
        self.accelerator, self.coefficient, self.experts_per_token = accelerator, coefficient, experts_per_token
        self._step: RouterSums | None = None  # of all batches and ranks. None: the step is one batch of one rank
        self._last: RouterSums | None = None
        self._sums: RouterSums | None = None

    def count(
        self,
        batches: list[PackedBatch],
        forward: Callable[[PackedBatch], Any],
        survives: Callable[[BaseException], bool],
        agree_on: Callable[[BaseException | None], BaseException | None],
    ) -> BaseException | None:
        """Start an optimizer step on `batches`. With a loss, and several batches or ranks, count their load first.

        Args:
            batches: All batches of this rank.
            forward: The model's forward pass, which records.
            survives: As `Policy.survives`.
            agree_on: As `Policy.agree_on`.

        Returns:
            None, or the error if memory ran out on any rank, on every rank.
        """
        self._step = self._last = self._sums = None
        if self.coefficient == 0 or (len(batches) == 1 and self.accelerator.num_processes == 1):
            return None
        error: BaseException | None = None
        try:
            for batch in reversed(batches):  # as in reference.py
                forward(batch)
                self.take()
        except (RuntimeError, MemoryError) as caught:
            if not survives(caught):
                raise
            error = caught.with_traceback(None)
        error = agree_on(error)
        if error is None:
            self._step = self._over_ranks()
            self._sums = None
        return error

    def record(self, logits: tuple[Tensor, ...], counts_T: Tensor) -> None:
        """Keep the sums of one forward pass.

        Args:
            logits: Router logits of each layer: [T, E], or [S, L, E] of padded rows.
            counts_T: How often each token counts.
        """
        learning = torch.is_grad_enabled() and self.coefficient != 0
        chosen, probability = [], []
        with torch.set_grad_enabled(learning), torch.autocast(counts_T.device.type, enabled=False):
            for layer in logits:
                probability_TE = layer.reshape(len(counts_T), -1).float().softmax(-1)
                chosen_TK = probability_TE.topk(self.experts_per_token).indices
                often_TK = counts_T[:, None].expand_as(chosen_TK)
                empty_E = torch.zeros_like(probability_TE[0])
                chosen.append(empty_E.scatter_add(0, chosen_TK.flatten(), often_TK.flatten()))
                probability.append(counts_T @ probability_TE)
            self._last = RouterSums(torch.stack(chosen), torch.stack(probability).sum(0), counts_T.sum())

    def take(self) -> RouterSums:
        """Return the sums of the last forward pass, and count them for `metrics`."""
        assert self._last is not None, "no forward pass has been recorded"
        last, self._last = self._last, None
        sums = last.detached()
        self._sums = sums if self._sums is None else self._sums + sums
        return last

    def loss(self) -> Tensor:
        """Return the share of the last forward pass in the loss of the step, times `coefficient`."""
        batch = self.take()
        step = self._step or batch.detached()
        layers, experts = step.chosen_LE.shape
        pairs = layers * step.tokens.clamp(min=1)
        share_E = (step.chosen_LE.sum(0) / pairs).float()
        return self.coefficient * experts * (share_E * batch.probability_E).sum() / pairs.float()

    def metrics(self) -> dict[str, float]:
        """Return what `load_metrics` says of the last optimizer step, over all ranks. Collective."""
        sums = self._over_ranks()
        return {} if sums is None else load_metrics(sums, self.experts_per_token)

    def _over_ranks(self) -> RouterSums | None:
        sums = self._sums
        return None if sums is None else sums.like(sum_over_ranks(self.accelerator, sums.flat()))


def load_metrics(sums: RouterSums, experts_per_token: int) -> dict[str, float]:
    """Return the loss before its coefficient, and the load of the experts. Empty if no token counted."""
    layers, experts = sums.chosen_LE.shape
    tokens = float(sums.tokens)
    if not tokens:
        return {}
    loss = experts * (sums.chosen_LE.sum(0) * sums.probability_E).sum() / (layers * tokens) ** 2
    fair = tokens * experts_per_token / experts
    return {
        "policy/router_aux_loss": float(loss),
        "policy/expert_load_max": float(sums.chosen_LE.max()) / fair,
        "policy/experts_unused": float((sums.chosen_LE == 0).float().mean()),
    }


def row_counts(batch: PackedBatch) -> Tensor:
    """Return for each packed token [T] how many completions that count in the loss have it in their row.

    The prompt of a split group counts for the completions in all its batches: it is computed in one of them only.
    """
    counted_S = _counted(batch)
    counts: list[Tensor] = []
    sequence = 0
    for span in batch.spans:
        own = counted_S[sequence : sequence + len(span.completion_lengths)]
        sequence += len(own)
        prompt = own.sum() if span.split is None else torch.tensor(float(span.split.counted))
        lengths = torch.tensor(span.completion_lengths)
        counts += [prompt.repeat(span.prompt_length), own.repeat_interleave(lengths)]
    return torch.cat(counts).to(batch.input_ids_T.device)


def padded_row_counts(batch: PackedBatch, width: int) -> Tensor:
    """Return the same for plain rows [S * width]: 1 for the tokens of a row that counts, 0 for padding."""
    prompts = [span.prompt_length for span in batch.spans for _ in span.completion_lengths]
    lengths_S = torch.tensor(prompts) + torch.tensor([n for span in batch.spans for n in span.completion_lengths])
    is_token = torch.arange(width) < lengths_S[:, None]
    return (is_token * _counted(batch)[:, None]).flatten().to(batch.input_ids_T.device)


def _counted(batch: PackedBatch) -> Tensor:
    """Return 1 for each completion [S] that counts in the loss, and 0 for others, on the CPU."""
    first_S = batch.lengths_S.cumsum(0) - batch.lengths_S
    return batch.weights_N[first_S].cpu()


def load_balance(model: PreTrainedModel, coefficient: float | None, accelerator: Accelerator) -> LoadBalance | None:
    """Return the load balancing of a model's routers. None if there are none that a loss balances.

    Args:
        model: The causal LM.
        coefficient: objective.router_aux_loss_coef. None: that of the model's config.
        accelerator: The Accelerator of the run.

    Raises:
        ConfigError: A coefficient is given, and there are no such routers.
    """
    config = text_config(model.config)
    returns_loss = "output_router_logits" in inspect.signature(type(model).forward).parameters
    if not (hasattr(config, COEFFICIENT) and returns_loss and has_routers(model)):
        if coefficient:
            raise ConfigError(no_router_loss(coefficient, type(model).__name__))
        return None
    experts_per_token = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    own = float(getattr(config, COEFFICIENT) or 0.0)
    return LoadBalance(accelerator, own if coefficient is None else coefficient, int(experts_per_token or config.moe_k))


def has_routers(model: PreTrainedModel) -> bool:
    """Return whether the text decoder returns the logits of its routers, and has any."""
    recorders: Any = (getattr(text_decoder(model), "_can_record_outputs", None) or {}).get("router_logits", [])
    found = [getattr(one, "target_class", one) for one in (recorders if isinstance(recorders, list) else [recorders])]
    kinds = tuple(kind for kind in found if isinstance(kind, type))
    return any(isinstance(module, kinds) for module in text_decoder(model).modules())


def no_router_loss(coefficient: float, kind: str) -> str:
    """Return the message for a coefficient without a loss that it could weigh."""
    return (
        f"objective.router_aux_loss_coef is {coefficient}, but {kind} has no routers that a loss balances (it has no "
        f"experts, or balances them otherwise): set it to 0, or leave it out"
    )


def experts_line(model: PreTrainedModel, balance: LoadBalance | None, *, adapted: bool) -> str | None:
    """Return what the log says of a mixture of experts: the loss, and what the adapter takes in. None without experts.

    Args:
        model: The causal LM, with its adapter.
        balance: Its load balancing.
        adapted: It has an adapter.
    """
    if not has_routers(model):
        return None
    line = "mixture of experts: balanced by the model itself, without a loss"
    if balance is not None:
        line = f"mixture of experts: router_aux_loss_coef {balance.coefficient:g}"
    if not adapted:
        return f"{line}; experts and routers are trained"
    experts, others = set(), set()
    for name, layer in lora_layers(model):
        if adapted_parameter(layer).ndim == 3:
            experts.add(f"{layer.parameter_name} (rank {layer.r[ADAPTER_NAME]} for each expert)")
        else:
            others.add(name.split(".")[-1])
    stacked = ", ".join(sorted(experts)) or "none in experts that are one tensor"
    return f"{line}; adapters: {stacked}; other layers: {', '.join(sorted(others)) or 'none'}"
