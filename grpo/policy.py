"""Policy: the weights that learn, the frozen reference, and the optimizer; logprobs(batch) -> backward -> step."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, NumericsError
from grpo.kernels.cpu.decoder_layer import use_lean_layers
from grpo.kernels.cpu.gemm import accumulate_grads_inplace
from grpo.models.loading import load_to_train
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.lora import add_adapter, off, save_adapter
from grpo.models.optimizer_state import Tensors, optimizer_from_tensors, optimizer_to_tensors
from grpo.models.reference import Reference, check_vocabulary
from grpo.models.strategies import deepspeed as zero
from grpo.models.strategies import fsdp as sharding
from grpo.models.weights import WorkingCopy, full, save_plain, whole
from grpo.packing import PackedBatch
from grpo.runtime.distributed import compute_dtype, from_main, is_sharded, return_freed_memory


class Policy:
    """Everything that learns. `model` is the live model; `logprob_model` is what it goes through, wrapped for the machine;
    `sampler` is the plain model that engines read, brought up to date by `refresh_sampler`; with `separate_sampler` it
    shares no memory with what learns, so that it can be read meanwhile."""

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
        self.accelerator, self.config = accelerator, config
        self.optimizer_config = optimizer
        self.max_grad_norm = optimizer.max_grad_norm
        self.zero_stage = zero.stage(accelerator)
        if self.zero_stage:
            zero.configure(accelerator, optimizer.max_grad_norm)
        self.read_once = sharding.reads_once(accelerator) and not config.load_in_4bit
        self.model, self.uses_packed_attention = load_to_train(path, config, accelerator, once=self.read_once)
        if accelerator.device.type == "cpu":
            # ZeRO gathers a weight while its own layer is called, and adds up gradients over ranks in the order in which they come:
            # all must take the same way through a layer, and gemm.c is only for those with rows enough.
            use_lean_layers(self.model, products=not self.zero_stage)
        self.working_copy = WorkingCopy(self.model)
        logprob_model = LogprobModel(
            self.model,
            uses_packed_attention=self.uses_packed_attention,
            temperature=temperature,
            entropy_gradient=objective.entropy_coef != 0,
        )
        self.reference: Reference | None = None
        with_lora = lora is not None and lora.r is not None
        if objective.beta > 0 and (config.reference or not with_lora):
            self.reference = self._second_model(logprob_model, path)
        self.adapter = None
        if with_lora:
            assert lora is not None
            self.adapter = add_adapter(self.model, lora, base=path)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()  # checkpointing is only active in train mode; every dropout is 0, so nothing else changes
        self.working_copy.follow(
            self.model,
            accelerator.device,
            compute=None if self.zero_stage == 2 else compute_dtype(accelerator),
            rounded=compute_dtype(accelerator) if self.zero_stage == 2 else None,  # it casts the live weights
            sharded=is_sharded(accelerator) and self.zero_stage != 2,
            separate=separate_sampler,
            hold=not sampled_elsewhere,
        )
        alone = accelerator.device.type == "cpu" and not is_sharded(accelerator) and accelerator.scaler is None
        self.fused = True if alone else None  # None: torch chooses
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            weight_decay=optimizer.weight_decay,
            fused=self.fused,
        )
        prepare: Callable = partial(sharding.shard, accelerator) if self.read_once else accelerator.prepare
        self.logprob_model, self.prepared_optimizer = prepare(logprob_model, self.optimizer)
        # Ranks that share weights must go through the model equally often, and a checkpointed layer once in each direction.
        self.shares_prompts = (
            self.uses_packed_attention
            and type(self.logprob_model) is LogprobModel
            and not config.gradient_checkpointing
        )
        zero.announce(logprob_model, self.model.get_output_embeddings())
        self.scheduler = get_scheduler(
            optimizer.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=math.ceil(optimizer.warmup_ratio * optimizer_steps),
            num_training_steps=optimizer_steps,
        )
        if objective.beta > 0 and self.reference is None:
            adapter = self.adapter
            self.reference = Reference(self.logprob_model, self.device, switch=lambda: off(adapter))  # type: ignore[arg-type]

    def _second_model(self, logprob_model: "LogprobModel", path: str) -> Reference:
        """A frozen copy of the policy, or the model that model.reference names."""
        name = self.config.reference
        if name is None:
            other, uses_packed_attention = copy.deepcopy(self.model), self.uses_packed_attention
        else:
            plain = ModelConfig(attn_implementation=self.config.attn_implementation)
            other, uses_packed_attention = load_to_train(name, plain, self.accelerator, once=self.read_once)
            check_vocabulary(
                self.model.config.vocab_size,
                other.config.vocab_size,
                load_tokenizer(path, self.config.gguf_file),
                load_tokenizer(name),
                name,
            )
        if self.read_once:
            sharding.broadcast_weights(other, self.device)
        frozen = LogprobModel(other, uses_packed_attention=uses_packed_attention, temperature=logprob_model.temperature)
        return Reference(frozen, self.device, offload=self.config.reference_offload)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def sampler(self) -> PreTrainedModel:
        """The plain model that engines read. Fresh after `refresh_sampler`."""
        return self.working_copy.model

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def refresh_sampler(self) -> None:
        """Bring `sampler` up to date with the weights. Collective where they are sharded."""
        self.working_copy.refresh()

    def plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the plain model, for an engine that is elsewhere. Collective where sharded."""
        return self.working_copy.stream()

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[N] logprobs with a gradient, [N] entropies without."""
        with self.accelerator.autocast():  # FSDP2's wrapper, unlike DDP's, does not bring it along
            return self.logprob_model(batch)

    def reference_logprobs(self, batches: list[PackedBatch]) -> list[Tensor | None]:
        """[N] logprobs of the reference for each batch; None where there is none."""
        if self.reference is None:
            return [None] * len(batches)
        with self.accelerator.autocast():
            logprobs: list[Tensor | None] = [*self.reference.logprobs(batches)]
        return_freed_memory(self.device)
        return logprobs

    def sync_reference(self, done: int) -> None:
        """After step `done`: move the reference towards the policy, where model.sync_ref_model says so."""
        if self.reference is not None and self.config.sync_ref_model and done % self.config.ref_model_sync_steps == 0:
            self.reference.sync(self.model, self.config.ref_model_mixup_alpha)

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Ranks exchange gradients only where `sync` is true: at the last batch of an optimizer step."""
        self.last_of_step = sync
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.logprob_model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which was divided by counts over all ranks: so gradients must add up over ranks,
        and the average that DDP, FSDP and ZeRO take is undone here."""
        loss = loss * self.accelerator.num_processes
        if self.zero_stage:
            zero.backward(self.logprob_model, loss, last=self.last_of_step)
        else:
            with accumulate_grads_inplace() if type(self.logprob_model) is LogprobModel else contextlib.nullcontext():
                self.accelerator.backward(loss)

    def step(self, usable: bool = True) -> float:
        """Clip, step, clear. -> the gradient norm before clipping.

        A gradient that is not finite, or one that is not `usable` (the same on every rank), changes no weight and no
        moment of the optimizer; `skipped_in_a_row` counts how often that has just happened.
        """
        if self.zero_stage:
            norm = zero.step(self.logprob_model)
            taken = math.isfinite(norm)
        else:
            norm = float(full(self.accelerator.clip_grad_norm_(self.logprob_model.parameters(), self.max_grad_norm)))
            taken = usable and math.isfinite(norm)
            if self.accelerator.scaler is not None:
                # It looks for overflow itself, skips the step and scales less: no fault while there is scale to take away.
                taken = usable and (taken or self.accelerator.scaler.get_scale() > 1)
                self.prepared_optimizer.step()
            elif taken:
                self.prepared_optimizer.step()
            self.prepared_optimizer.zero_grad()
        if self.shares_prompts:
            self.logprob_model.prompts.forget()
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        self.scheduler.step()
        return_freed_memory(self.device)
        return norm

    last_of_step = True
    skipped_in_a_row = 0

    def check(self) -> None:
        """Raise NumericsError unless logprobs are finite and <= 0, and the KL to the reference is 0 where it must be."""
        batch = probe_batch(self.model.config.vocab_size).to(self.device)
        with torch.no_grad():
            logprobs = self.logprobs(batch)[0]
        reference = self.reference_logprobs([batch])[0]
        if not bool(torch.isfinite(logprobs).all()) or bool((logprobs > 1e-4).any()):
            raise NumericsError("the model's logprobs are not finite or above 0: its weights may be damaged")
        if reference is None or not self.reference_is_start:
            return
        tolerance = 1e-4 if compute_dtype(self.accelerator) is None else 5e-2
        furthest = float((logprobs - reference).abs().max())
        if furthest > tolerance:
            raise NumericsError(
                f"the reference is a copy of the policy, but their logprobs differ by up to {furthest:.2g} at the start "
                f"(rounding explains {tolerance}): the KL would not start at 0"
            )

    reference_is_start = True
    """False once weights were loaded from a checkpoint, or when model.reference names another model."""

    def state(self) -> tuple[Tensors, dict]:
        """What a checkpoint holds of the policy: (tensors, plain values). Collective where weights are sharded.

        Weights that never change (the base under an adapter, a frozen reference) are not in it.
        """
        if self.zero_stage:
            weights, moments = zero.full_state(self.model, self.optimizer)
        elif is_sharded(self.accelerator):
            weights, moments = sharding.full_state(self.logprob_model, self.optimizer)
        else:
            learned = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            weights = dict(self.model.state_dict())
            if self.adapter is not None:
                weights = {name: tensor for name, tensor in weights.items() if name in learned}
            moments = self.optimizer.state_dict()
        optimizer_tensors, groups = optimizer_to_tensors(moments)
        tensors = {"model": weights, "optimizer": optimizer_tensors}
        if self.reference is not None and self.config.sync_ref_model:
            tensors["reference"] = {name: full(value) for name, value in self.reference.model.state_dict().items()}
        state = {"optimizer": groups, "scheduler": self.scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            state["loss_scale"] = self.accelerator.scaler.state_dict()
        return tensors, state

    def bytes_on_disk(self) -> tuple[int, int]:
        """About how much `state` and `save` will write: weights and two moments in float32 of what is trained, and the whole model."""
        named = dict(self.model.named_parameters(remove_duplicate=False))  # a tied head is written under both its names
        count = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in named.items()}  # ZeRO-3
        whole = sum(count[name] * parameter.element_size() for name, parameter in named.items())
        moments = 8 * sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )
        adapter = 4 * sum(count[name] for name, parameter in named.items() if parameter.requires_grad)
        synced = whole if self.reference is not None and self.config.sync_ref_model else 0
        if self.adapter is None:
            return whole + moments + synced, whole
        return adapter + moments + synced, whole + adapter

    @property
    def takes_tensors_from_main(self) -> bool:
        """Whether `load_state` hands out what the main process has read of a checkpoint: with FSDP2."""
        return self.accelerator.is_fsdp2

    def load_state(self, tensors: Tensors, state: dict) -> None:
        """What `state` gave, on every rank; the tensors only on the main process where `takes_tensors_from_main`. Raises ConfigError if the
        checkpoint is of another kind of run."""
        given = not self.takes_tensors_from_main or self.accelerator.is_main_process
        moments = optimizer_from_tensors(tensors["optimizer"], state["optimizer"]) if given else {}
        for group in moments.get("param_groups", []):
            group["fused"] = self.fused  # not what was right where the checkpoint was written
        if self.zero_stage:
            zero.load_full_state(self.model, self.logprob_model, self.optimizer, tensors["model"], moments)
        elif is_sharded(self.accelerator):
            sharding.load_full_state(self.logprob_model, self.optimizer, tensors.get("model", {}), moments)
        else:
            unknown = self.model.load_state_dict(tensors["model"], strict=False).unexpected_keys
            if unknown:
                raise ConfigError(
                    f"the checkpoint holds {unknown[0]} and {len(unknown) - 1} more weights that this model does not have: "
                    f"resume with the lora.* and model.name that the run was started with"
                )
            if self.adapter is None:
                self.model.tie_weights()
            self.optimizer.load_state_dict(moments)
        self.scheduler.load_state_dict(state["scheduler"])
        self._apply(self.optimizer_config)
        if self.accelerator.scaler is not None and "loss_scale" in state:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        if self.config.sync_ref_model and self.reference is not None:
            self._load_reference(self.reference.model, tensors)

    def _load_reference(self, model: nn.Module, tensors: Tensors) -> None:
        def check() -> None:
            if "reference" not in tensors:
                raise ConfigError("the checkpoint has no reference: resume with model.sync_ref_model as it was started")

        if self.takes_tensors_from_main:
            from_main(self.accelerator, check)
            sharding.load_everywhere(model, tensors.get("reference", {}), self.device)
        else:
            check()
            model.load_state_dict(tensors["reference"], strict=False)

    def _apply(self, config: OptimizerConfig) -> None:
        """The config's own rates, where they are not those of the checkpoint: a resumed run learns as it is told now."""
        if not isinstance(self.scheduler, torch.optim.lr_scheduler.LambdaLR):
            return
        self.scheduler.base_lrs = [config.learning_rate] * len(self.scheduler.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = config.learning_rate
            group["lr"] = config.learning_rate * factor(self.scheduler.last_epoch)
            group["betas"] = (config.adam_beta1, config.adam_beta2)
            group["weight_decay"] = config.weight_decay
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """A plain Hugging Face folder: AutoModelForCausalLM.from_pretrained loads it. With LoRA, merged; the adapter alone
        is put beside it, in adapter/. Every rank must call it; the main process writes."""
        main = self.accelerator.is_main_process
        if self.adapter is None and not is_sharded(self.accelerator):
            if main:
                attention = self.model.config._attn_implementation
                self.model.set_attn_implementation("sdpa")
                self.model.save_pretrained(folder)
                self.model.set_attn_implementation(attention)
        else:
            save_plain(self.model, folder, write=main)
        if self.adapter is not None:
            weights = {name: whole(value) for name, value in self.model.named_parameters() if value.requires_grad}
            if main:
                save_adapter(self.adapter, folder.parent / "adapter", weights)
        if main:
            tokenizer.save_pretrained(folder)
