"""Policy: the model that is trained. Packed batch -> logprobs -> backward -> optimizer step.

N    completion tokens of a batch
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.errors import ConfigError, NumericsError, is_out_of_memory
from grpo.models.adapter_check import check_merge
from grpo.models.architecture import vocabulary_size
from grpo.models.build import build_trained_model
from grpo.models.device_check import check_on_device
from grpo.models.logprob_model import probe_batch, run_self_test
from grpo.models.lora import save_adapter
from grpo.models.optimizer_state import Tensors, optimizer_from_tensors, optimizer_to_tensors
from grpo.models.optimizers import override_hyperparameters
from grpo.models.reference import FrozenReference, detached_outputs
from grpo.models.weights import bytes_on_disk, save_full_weights, save_live_model
from grpo.objectives.entropy import EntropyBonus
from grpo.packing import PackedBatch
from grpo.runtime.device import empty_cache, is_cpu, return_freed_memory
from grpo.runtime.distributed import run_on_main
from grpo.runtime.precision import compute_dtype, precision_of


class Policy:
    """The trained model, its frozen reference and its optimizer.

    How the model is distributed over processes is up to its strategy (grpo/models/strategies/).

    Args:
        accelerator: The Accelerator of the run.
        path: Folder or hub id of the model.
        config: The `model.*` section of the config.
        objective: The `objective.*` section: whether there is a reference, and entropies with a gradient.
        optimizer: The `optimizer.*` section.
        lora: The `lora.*` section; None, or r null, for full fine-tuning.
        temperature: The sampling temperature, by which logits are divided in training too.
        optimizer_steps: Length of the learning rate schedule.
        separate_sampler: Let `sampler` share no memory with the live model, so that it can be read during training.
        sampled_elsewhere: No engine samples in this process: `sampler` takes no memory and must not be used.

    Attributes:
        model: The live causal LM. Its parameters may be shards or carry an adapter.
        logprob_model: The forward pass of `model`, wrapped by the strategy.
        uses_packed_attention: The model takes packed batches as they are; otherwise they are padded.
        shares_prompts: Batches of one optimizer step may share the forward pass of a prompt.
        entropy_bonus: Coefficient of the entropy bonus.
        balance: Load balancing of a mixture of experts; None for other models.
        skipped_in_a_row: Number of optimizer steps that were just skipped because of a number that is not finite.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: str,
        config: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        lora: LoraConfig | None = None,
        *,
        temperature: float,
        optimizer_steps: int,
        separate_sampler: bool = False,
        sampled_elsewhere: bool = False,
    ):
        built = build_trained_model(
            accelerator,
            path,
            config,
            objective,
            optimizer,
            lora,
            temperature=temperature,
            optimizer_steps=optimizer_steps,
            separate_sampler=separate_sampler,
            sampled_elsewhere=sampled_elsewhere,
        )
        self.accelerator, self.config, self.optimizer_config = accelerator, config, optimizer
        self.strategy, self.model, self.logprob_model = built.strategy, built.model, built.logprob_model
        self.adapter, self.reference, self.working_copy = built.adapter, built.reference, built.working_copy
        self.optimizer, self.scheduler = built.optimizer, built.scheduler
        self.uses_packed_attention, self.shares_prompts = built.uses_packed_attention, built.shares_prompts
        self.balance = built.balance
        self.synced_reference: FrozenReference | None = None
        if config.sync_ref_model and isinstance(built.reference, FrozenReference):
            self.synced_reference = built.reference
        self.skipped_in_a_row, self.entropy_bonus = 0, EntropyBonus(objective)
        self.reference_is_initial_policy = config.reference is None

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self.accelerator.device

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.scheduler.get_last_lr()[0])

    # Forward

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return logprobs [N] with a gradient, and entropies [N] in nats."""
        with self.strategy.autocast():
            return self.logprob_model(batch)

    def old_logprobs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Return logprobs [N] of each batch under the weights as they are now, without a gradient."""
        return [logprobs for logprobs, _ in self._detached(batches)]

    def entropies(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Return entropies [N] of each batch, as `old_logprobs`."""
        return [entropies for _, entropies in self._detached(batches)]

    def _detached(self, batches: list[PackedBatch]) -> list[tuple[Tensor, Tensor]]:
        with self.strategy.autocast():
            found = detached_outputs(self.logprob_model, batches)
        return_freed_memory(self.device)
        return found

    def reference_logprobs(self, batches: list[PackedBatch]) -> list[Tensor | None]:
        """Return the reference's logprobs [N] of each batch, or None for each if there is no reference."""
        if self.reference is None:
            return [None] * len(batches)
        with self.strategy.autocast():
            logprobs: list[Tensor | None] = [*self.reference.logprobs(batches)]
        return_freed_memory(self.device)
        return logprobs

    def check(self) -> None:
        """Check the kernels, that logprobs are finite and at most 0, and that the KL to a copy of the policy is 0.

        Raises:
            NumericsError: They are not. A kernel that is wrong is switched off instead.
        """
        run_self_test(self.model, compute_dtype(self.accelerator))
        if self.uses_packed_attention and not is_cpu(self.device) and not self.strategy.shards_weights:
            precision = precision_of(self.accelerator, self.model.dtype)
            check_on_device(self.strategy.logprob_model, self.strategy.autocast, precision, self.device)
        if self.adapter is not None and self.strategy.exposes_weights and self.working_copy.is_allocated:
            plain, tolerance = self.strategy.logprob_model, precision_of(self.accelerator, self.model.dtype).logprob
            with self.strategy.autocast():
                check_merge(self.logprob_model, plain, self.working_copy, tolerance)
        batch = probe_batch(vocabulary_size(self.model)).to(self.device)
        with torch.no_grad():
            logprobs = self.logprobs(batch)[0]
        reference = self.reference_logprobs([batch])[0]
        if not bool(torch.isfinite(logprobs).all()) or bool((logprobs > 1e-4).any()):
            raise NumericsError("the model's logprobs are not finite or above 0: its weights may be damaged")
        if reference is None or not self.reference_is_initial_policy:
            return
        tolerance = precision_of(self.accelerator).copy
        largest = float((logprobs - reference).abs().max())
        if largest > tolerance:
            raise NumericsError(
                f"the reference is a copy of the policy, but their logprobs differ by up to {largest:.2g} at the start "
                f"(rounding explains {tolerance}): the KL would not start at 0"
            )

    # Load of experts

    @property
    def has_router_loss(self) -> bool:
        """The load-balancing loss of a mixture of experts is a term of the objective."""
        return self.balance is not None and self.balance.coefficient != 0

    def count_expert_load(self, batches: list[PackedBatch]) -> BaseException | None:
        """Start an optimizer step on `batches`: count the experts' load, where a loss needs it. Collective.

        Returns:
            None, or the error if memory ran out on any rank, on every rank.
        """
        if self.balance is None:
            return None
        with torch.no_grad(), self.strategy.autocast():
            return self.balance.count(batches, self.logprob_model, self.survives, self.agree_on)

    def router_loss(self) -> Tensor | float:
        """Return the share of the last forward pass in the router loss of the step. 0 without experts."""
        return 0.0 if self.balance is None else self.balance.loss()

    def expert_metrics(self) -> dict[str, float]:
        """Return the load of the experts in the last optimizer step over all ranks. Collective."""
        return {} if self.balance is None else self.balance.metrics()

    # Update

    def accumulate(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one batch. Ranks exchange gradients only with `sync`: at the last batch of a step."""
        return self.strategy.accumulate(sync=sync)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a sum divided by counts over all ranks, to the gradients of all ranks."""
        self.strategy.backward(loss)

    def discard_gradients(self) -> None:
        """Drop the gradients of an optimizer step that was not completed."""
        self.strategy.discard_gradients()
        empty_cache(self.device)

    def survives(self, error: BaseException) -> bool:
        """Return whether `error` is a lack of memory after which all ranks can go on. See `agree_on`."""
        return is_out_of_memory(error) and self.strategy.survives_out_of_memory

    def agree_on(self, error: BaseException | None) -> BaseException | None:
        """Return an error on every rank if memory has run out on any of them, else None. Collective.

        Call it at once after an error that this policy `survives`, and otherwise after the last forward or backward.
        """
        return self.strategy.agree_on(error)

    @property
    def batches_are_local(self) -> bool:
        """No batch exchanges gradients: `complete_gradients` does."""
        return self.strategy.batches_are_local

    def complete_gradients(self, error: BaseException | None) -> BaseException | None:
        """End the batches of a step: agree on `error`, and without one add up local gradients. Collective."""
        error = self.agree_on(error)
        if error is None:
            self.strategy.exchange_gradients()
        return error

    def step(self, usable: bool = True) -> float:
        """Clip gradients, update weights, clear gradients, advance the learning rate.

        Args:
            usable: False on all ranks if the loss is not finite on any rank. All ranks then skip the update, as they do
                for gradients that are not finite: weights and optimizer state stay as they are.

        Returns:
            The gradient norm before clipping.
        """
        norm, taken = self.strategy.clip_and_step(usable)
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        self.scheduler.step()
        return_freed_memory(self.device)
        return norm

    def skip_step(self) -> None:
        """Advance the learning rate of a step without anything to train on."""
        self.scheduler.step()

    # Copies of the weights

    @property
    def sampler(self) -> PreTrainedModel:
        """The plain model that engines sample from, current as of `refresh_sampler`."""
        return self.working_copy.model

    def refresh_sampler(self) -> None:
        """Copy the live weights to `sampler`. Collective where they are sharded."""
        self.working_copy.refresh()

    def sampler_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, full tensor) of the live weights, for an engine in another process. Collective."""
        return self.working_copy.weights()

    def sync_reference(self, step: int) -> None:
        """Move the reference towards the policy after every model.ref_model_sync_steps steps, if configured."""
        if self.synced_reference is not None and step % self.config.ref_model_sync_steps == 0:
            self.synced_reference.sync(self.strategy.full_weights(self.model), self.config.ref_model_mixup_alpha)

    # Checkpoints

    @property
    def broadcasts_checkpoint(self) -> bool:
        """`load_state_dict` needs the tensors on the main process only and distributes them."""
        return self.strategy.broadcasts_checkpoint

    def state_dict(self) -> tuple[Tensors, dict]:
        """Return the state of training: trained weights, optimizer, schedule. Collective where weights are sharded.

        Returns:
            Tensors by group and name, and plain values for JSON. Frozen weights (the base of an adapter, a reference
            that is not synced) are not part of it.
        """
        weights, moments = self.strategy.state_dict()
        optimizer_tensors, optimizer = optimizer_to_tensors(moments)
        tensors = {"model": weights, "optimizer": optimizer_tensors}
        if self.synced_reference is not None:
            tensors["reference"] = dict(self.synced_reference.model.state_dict())
        state: dict[str, Any] = {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        state |= {"skipped_in_a_row": self.skipped_in_a_row, "entropy_bonus": self.entropy_bonus.state_dict()}
        if self.accelerator.scaler is not None:
            state["loss_scale"] = self.accelerator.scaler.state_dict()
        return tensors, state

    def load_state_dict(self, tensors: Tensors, state: dict) -> None:
        """Restore `state_dict` on every rank; hyperparameters are taken from the config. Collective.

        Args:
            tensors: Needed on the main process only if `broadcasts_checkpoint`; other ranks pass {}.
            state: The plain values.

        Raises:
            ConfigError: The checkpoint does not fit the model or the config.
        """
        moments = optimizer_from_tensors(tensors["optimizer"], state["optimizer"]) if tensors else {}
        for group in moments.get("param_groups", []):
            if "fused" in group:
                group["fused"] = self.strategy.fused_optimizer  # not that of the machine that wrote the checkpoint
        self.strategy.load_state_dict(tensors.get("model", {}), moments)
        self.scheduler.load_state_dict(state["scheduler"])
        override_hyperparameters(self.optimizer, self.scheduler, self.optimizer_config)
        if self.accelerator.scaler is not None and "loss_scale" in state:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        if self.synced_reference is not None:
            run_on_main(self.accelerator, lambda: _check_has_reference(tensors))
            self.strategy.load_replicated(self.synced_reference.model, tensors.get("reference", {}))
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.entropy_bonus.load_state_dict(state.get("entropy_bonus", {}))
        self.reference_is_initial_policy = False

    def bytes_on_disk(self) -> tuple[int, int]:
        """Return about how many bytes a checkpoint and the saved model will take."""
        has = {"has_adapter": self.adapter is not None, "has_synced_reference": self.synced_reference is not None}
        return bytes_on_disk(self.model, self.strategy, **has)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32) -> None:
        """Save a plain Hugging Face folder in `dtype`: AutoModelForCausalLM.from_pretrained loads it. Collective.

        A LoRA adapter is merged in, and also saved alone in adapter/ beside the folder, in float32.
        """
        main = self.accelerator.is_main_process
        if self.adapter is not None or not self.strategy.holds_exact_weights:
            save_full_weights(self.model, self.strategy, folder, write=main, dtype=dtype)
        elif main:
            save_live_model(self.model, folder, dtype)
        if self.adapter is not None:
            named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
            weights = {name: self.strategy.master_weight(value) for name, value in named}
            if main:
                save_adapter(self.adapter, folder.parent / "adapter", weights)
        if main:
            tokenizer.save_pretrained(folder)


def _check_has_reference(tensors: Tensors) -> None:
    if "reference" not in tensors:
        raise ConfigError("the checkpoint has no reference: resume with model.sync_ref_model as it was started")
