"""Policy: the weights that learn, the frozen reference, and the optimizer; logprobs(batch) -> backward -> step."""

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)
from transformers.utils.logging import disable_progress_bar

from grpo.attention import NAME, GroupSpan, grpo_attention
from grpo.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.errors import ConfigError, NumericsError
from grpo.logprobs import token_logprobs
from grpo.packing import PackedBatch

AttentionInterface.register(NAME, grpo_attention)
disable_progress_bar()  # "Loading weights 38/38": noise between our own lines


class Scorer(nn.Module):
    """A causal LM whose forward pass is what training needs: packed batch -> logprobs [N] and entropies [N].

    It is a module of its own, because wrappers (DDP, FSDP, autocast) only see what goes through `forward`.
    """

    def __init__(self, model: PreTrainedModel, *, swapped: bool, temperature: float, entropy_gradient: bool = False):
        super().__init__()
        self.model, self.swapped, self.temperature = model, swapped, temperature
        self.entropy_gradient = entropy_gradient

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        if self.swapped:
            hidden = self.model.base_model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                layout=batch.layout,
            ).last_hidden_state[0]
            hidden_NH = hidden[batch.predictor_N]
        else:
            ids, predictor = batch.rows()
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden_NH = hidden.flatten(0, 1)[predictor]
        head = self.model.get_output_embeddings()
        return token_logprobs(
            hidden_NH, head.weight, batch.tokens_N, self.temperature, entropy_gradient=self.entropy_gradient
        )


class Policy:
    """Everything that learns. `scorer` is the wrapped module; `model` and `tokenizer` are plain Hugging Face objects."""

    def __init__(
        self,
        accelerator: Accelerator,
        path: str,
        config: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        optimizer_steps: int,
    ):
        self.accelerator = accelerator
        self.max_grad_norm = optimizer.max_grad_norm
        self.model = load_model(path)
        self.swapped = use_grpo_attention(self.model)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.train()  # checkpointing is only active in train mode; every dropout is 0, so nothing else changes
        self.model.to(accelerator.device)
        self.reference: Scorer | None = None
        if objective.beta > 0:
            other = load_model(config.reference) if config.reference else copy.deepcopy(self.model)
            if config.reference:
                _check_vocabulary(self.model, other, config.reference)
                use_grpo_attention(other)
            other.requires_grad_(False).eval().to(accelerator.device)
            self.reference = Scorer(other, swapped=self.swapped, temperature=temperature)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            weight_decay=optimizer.weight_decay,
        )
        self.scheduler = get_scheduler(
            optimizer.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=math.ceil(optimizer.warmup_ratio * optimizer_steps),
            num_training_steps=optimizer_steps,
        )
        scorer = Scorer(
            self.model,
            swapped=self.swapped,
            temperature=temperature,
            entropy_gradient=objective.entropy_coef != 0,
        )
        self.scorer, self.prepared_optimizer = accelerator.prepare(scorer, self.optimizer)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[N] logprobs with a gradient, [N] entropies without."""
        return self.scorer(batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        """[N] logprobs of the frozen reference; None where there is none."""
        if self.reference is None:
            return None
        with self.accelerator.autocast():
            return self.reference(batch)[0]

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Ranks exchange gradients only where `sync` is true: at the last batch of an optimizer step."""
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.scorer):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which was divided by counts over all ranks: so gradients must add up over ranks,
        and the average that DDP and FSDP take is undone here."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> float:
        """Clip, step, clear. -> the gradient norm before clipping. A gradient that is not finite changes no weight."""
        norm = float(self.accelerator.clip_grad_norm_(self.scorer.parameters(), self.max_grad_norm))
        if math.isfinite(norm):
            self.prepared_optimizer.step()
        self.scheduler.step()
        self.prepared_optimizer.zero_grad()
        return norm

    def check(self) -> None:
        """Raise NumericsError unless logprobs are finite and <= 0, and the KL to the reference is 0 where it must be."""
        batch = probe_batch(self.model.config.vocab_size).to(self.device)
        with torch.no_grad():
            logprobs = self.logprobs(batch)[0]
            reference = self.reference_logprobs(batch)
        if not bool(torch.isfinite(logprobs).all()) or bool((logprobs > 1e-4).any()):
            raise NumericsError("the model's logprobs are not finite or above 0: its weights may be damaged")
        if reference is not None and self.reference_is_start and not torch.allclose(logprobs, reference, atol=1e-2):
            raise NumericsError("the reference is a copy of the policy, but their logprobs differ at the start")

    reference_is_start = True
    """False once weights were loaded from a checkpoint, or when model.reference names another model."""

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A plain Hugging Face folder: AutoModelForCausalLM.from_pretrained loads it."""
        attention = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")
        self.model.save_pretrained(folder)
        self.model.set_attn_implementation(attention)
        tokenizer.save_pretrained(folder)


def load_model(path: str) -> PreTrainedModel:
    """A causal LM with float32 weights and every dropout 0, so that sampling and scoring see one and the same policy."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name '{path}' cannot be loaded: {error}") from error
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
    return model.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name '{path}': its tokenizer cannot be loaded: {error}") from error


def use_grpo_attention(model: PreTrainedModel) -> bool:
    """Switch to our attention if it gives the same logprobs as the model's own on a probe; else leave the model as it is.

    -> whether it was switched. The probe is two groups with prompts and completions of different lengths.
    """
    batch = probe_batch(model.config.vocab_size).to(next(model.parameters()).device)
    with torch.no_grad():
        plain = Scorer(model, swapped=False, temperature=1.0)(batch)[0]
        try:
            model.set_attn_implementation(NAME)
            packed = Scorer(model, swapped=True, temperature=1.0)(batch)[0]
        except (NotImplementedError, TypeError, ValueError):
            packed = None
    if packed is None or not torch.allclose(plain, packed, atol=1e-3, rtol=1e-3):
        model.set_attn_implementation("sdpa")
        return False
    return True


def probe_batch(vocabulary: int) -> PackedBatch:
    """A small made-up batch: two groups, prompts of 5 and 3 tokens, completions of 4, 2 and 3."""
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    tokens: list[int] = []
    spans, lengths = [], []
    for prompt_length, completion_lengths in ((5, (4, 2)), (3, (3,))):
        start = len(ids)
        spans.append(GroupSpan(start, prompt_length, completion_lengths))
        positions += range(prompt_length)
        ids += [(7 * (start + i) + 3) % vocabulary for i in range(prompt_length)]
        for length in completion_lengths:
            first = len(ids)
            new = [(11 * (first + i) + 5) % vocabulary for i in range(length)]
            predictor += [start + prompt_length - 1, *range(first, first + length - 1)]
            ids += new
            tokens += new
            positions += range(prompt_length, prompt_length + length)
            lengths.append(length)
    lengths_S = torch.tensor(lengths)
    zeros = torch.zeros(len(tokens))
    return PackedBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        spans,
        torch.tensor(predictor),
        torch.tensor(tokens),
        torch.arange(len(lengths)).repeat_interleave(lengths_S),
        zeros,
        zeros,
        zeros,
        lengths_S,
    )


def _check_vocabulary(model: PreTrainedModel, reference: PreTrainedModel, name: str) -> None:
    if reference.config.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"model.reference '{name}' has a vocabulary of {reference.config.vocab_size}, the policy one of "
            f"{model.config.vocab_size}: a KL between them means nothing. Use a reference with the same tokenizer"
        )
