"""Files of a GRPOTrainer: model, state, metrics, model card, and the upload to the hub."""

import json
from pathlib import Path
from typing import Any

from grpo.compat.arguments import GRPOConfig
from grpo.errors import ConfigError
from grpo.models.lora import save_adapter
from grpo.run.state import Run
from grpo.tracking.model_card import model_card, push

DEFAULT_DIR = "trainer_output"
"""output_dir where it is not set."""


class Outputs:
    """Base class of GRPOTrainer: the files that it writes."""

    args: GRPOConfig
    processing_class: Any
    state: Any
    """transformers' TrainerState: global_step, max_steps, epoch, log_history."""
    hub_model_id: str | None = None
    """Where push_to_hub has uploaded to."""

    def _build(self, resume: Path | None = None) -> Run:
        raise NotImplementedError

    @property
    def _output_dir(self) -> str:
        return self.args.output_dir or DEFAULT_DIR

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer, or the adapter, into a folder that transformers or peft load. Collective."""
        run, folder = self._build(), Path(output_dir or self._output_dir)
        policy = run.policy
        if policy.adapter is None:
            policy.save(folder, self.processing_class, run.save_dtype)
            return
        named = [(name, value) for name, value in policy.model.named_parameters() if value.requires_grad]
        weights = {name: policy.strategy.master_weight(value) for name, value in named}
        if self.is_world_process_zero():
            save_adapter(policy.adapter, folder, weights)
            self.processing_class.save_pretrained(folder)

    def save_state(self) -> None:
        """Write trainer_state.json into output_dir."""
        if self.is_world_process_zero():
            folder = Path(self._output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics, one a line."""
        if self.is_world_process_zero():
            width = max(map(len, metrics), default=0)
            print(f"***** {split} metrics *****")
            for key in sorted(metrics):
                print(f"  {key:{width}} = {metrics[key]}")

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write metrics to <split>_results.json in output_dir, and add them to all_results.json."""
        if not self.is_world_process_zero():
            return
        folder = Path(self._output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True))
        if combined:
            everything = folder / "all_results.json"
            before = json.loads(everything.read_text()) if everything.is_file() else {}
            everything.write_text(json.dumps(before | metrics, indent=4, sort_keys=True))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write README.md into output_dir: settings, rewards, evaluation and data of the run."""
        if self.is_world_process_zero():
            card = model_card(self._build().run_dir)
            data: Any = card.data
            data.model_name = model_name or data.model_name
            data.datasets = dataset_name or data.get("datasets")
            data.tags = [*(data.tags or []), *([tags] if isinstance(tags, str) else tags or [])]
            card.save(Path(self._output_dir) / "README.md")

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **given: Any) -> str | None:
        """Upload final/ with its model card to hub_model_id, by default the name of output_dir.

        Raises:
            StorageError: The hub cannot be reached or refuses, with the command that tries again.
            ConfigError: Nothing was trained.
        """
        run = self._build()
        self.hub_model_id = self.args.hub_model_id or run.run_dir.name
        if not (run.run_dir / "final").is_dir():
            raise ConfigError("push_to_hub: there is no final/ yet: call train() first")
        if not self.is_world_process_zero():
            return None
        model_card(run.run_dir).save(run.run_dir / "final" / "README.md")
        return push(
            run.run_dir / "final",
            self.hub_model_id,
            token=given.get("token") or self.args.hub_token,
            private=bool(self.args.hub_private_repo),
            commit_message=commit_message or "End of training",
            revision=given.get("revision") or self.args.hub_revision,
        )

    def is_world_process_zero(self) -> bool:
        """Return whether this is the main process."""
        return self.args.process_index == 0

    def is_local_process_zero(self) -> bool:
        """Return whether this is the main process of its machine."""
        return self.args.local_process_index == 0
