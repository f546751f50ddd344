"""Model card: a run directory -> the README.md of its published model, with config, data, evaluation and licence.

All numbers are read from the run. Missing facts appear as "not stated". The upload is here too; the data card must
permit it (grpo/data/card.py).
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from grpo.data.card import card_of_run, publishable
from grpo.errors import ConfigError, StorageError
from grpo.runtime.messages import visible
from grpo.tracking.report import fenced
from grpo.tracking.run_reader import RunFolder

_OF_REWARD = re.compile(r"eval/reward/.+/mean")
HELD_OUT = {"eval/accuracy": "accuracy", "eval/accuracy_flexible": "flexible accuracy", "eval/format": "format"}


def model_card(
    run_dir: Path, *, licence: str | None = None, data_card: dict[str, Any] | None = None, step: int | None = None
) -> ModelCard:
    """Return the card of a run's model, or of its checkpoint at `step`.

    Args:
        run_dir: the run directory.
        licence: the hub's identifier of the licence (apache-2.0, cc-by-4.0, ...).
        data_card: facts about the data (source, licence, permission, ...); None = the card that the run recorded.
        step: step of the checkpoint; None = the final model.

    Raises:
        ConfigError: for a folder that is not a run directory.
    """
    run = RunFolder(run_dir)
    config = run.config()
    if not config or not run.metrics.refresh():
        raise ConfigError(f"{run_dir} is no run directory: it needs config.yaml and metrics.jsonl")
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "reinforcement-learning"],
        base_model=_hub_id(str(config["model"]["name"])),
        model_name=_one_line(run.name),
        eval_results=_results(run, config, step),
    )
    header = data.to_yaml().strip()
    about_data = card_of_run(run_dir) if data_card is None else data_card
    return ModelCard(f"---\n{header}\n---\n{_body(run, config, licence, about_data, step)}")


def publish(
    run_dir: Path,
    folder: Path,
    repo_id: str,
    *,
    licence: str | None = None,
    step: int | None = None,
    private: bool = True,
    **hub: Any,
) -> str:
    """Write the card of the run's model into `folder` and upload the folder.

    Args:
        hub: `token` and `endpoint` of `push`.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: if the data card does not permit it, before anything is sent.
        StorageError: if the upload fails.
    """
    model_card(run_dir, licence=licence, data_card=publishable(run_dir), step=step).save(folder / "README.md")
    return push(folder, repo_id, private=private, **hub)


def push(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    private: bool = True,
    commit_message: str = "Model trained with GRPO",
    revision: str | None = None,
) -> str:
    """Upload a model folder. Without `token`, the token is HF_TOKEN. It is never read from a config.

    Returns:
        The address of the repository.

    Raises:
        StorageError: for any error of the network or the hub, with the command that tries again.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision)
    except Exception as error:  # the hub raises many types; all mean that the upload failed
        again = f"hf upload {repo_id} {folder}{' --private' if private else ''}"
        raise StorageError(
            f"cannot push {folder} to {repo_id}: {type(error).__name__}: {error}. The folder is complete; try again "
            f"with: {again}"
        ) from error
    return str(address)


def _series(run: RunFolder, key: str, step: int | None) -> tuple[list[int], list[float]]:
    """Return steps and values of a key, up to `step`."""
    steps, values = run.metrics.series(key)
    kept = [index for index, at in enumerate(steps) if step is None or at <= step]
    return [steps[index] for index in kept], [values[index] for index in kept]


def _results(run: RunFolder, config: dict[str, Any], step: int | None) -> list[EvalResult] | None:
    found = []
    for key, name in HELD_OUT.items():
        _, values = _series(run, key, step)
        if values:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="custom",
                    dataset_name=_one_line(
                        str(_without_places(config["data"].get("eval_path") or config["data"]["name"]))
                    ),
                    metric_type="accuracy",
                    metric_name=f"{name} (held out, greedy)",
                    metric_value=round(values[-1], 4),
                )
            )
    return found or None


def _body(
    run: RunFolder, config: dict[str, Any], licence: str | None, data_card: dict[str, Any], step: int | None
) -> str:
    environment = run.environment()
    rows = []
    rewards = {key: _one_line(key.removeprefix("eval/")) for key in run.metrics.columns if _OF_REWARD.fullmatch(key)}
    for key, name in (HELD_OUT | rewards).items():
        steps, values = _series(run, key, step)
        if values:
            rows.append(f"| {name} | {values[0]:.3f} (step {steps[0]}) | {values[-1]:.3f} (step {steps[-1]}) |")
    evaluation = (
        ["| held out | before | after |", "|---|---|---|", *rows] if rows else ["Not evaluated on held-out data."]
    )
    _, ci = _series(run, "eval/accuracy_ci95", step)
    low, high = (_series(run, f"eval/accuracy_{end}", step)[1] for end in ("low", "high"))
    if low and high:
        evaluation += ["", f"Greedy decoding; 95 % interval of the accuracy (Wilson): {low[-1]:.3f} to {high[-1]:.3f}."]
    elif ci:
        evaluation += ["", f"Greedy decoding; 95 % interval of the accuracy: ±{ci[-1]:.3f}."]
    source = config["data"].get("path") or config["data"]["name"]
    about = {"source": source, "licence": "not stated", "permission": "not stated", **data_card}
    without_paths = {key: value for key, value in config.items() if key not in ("run_dir", "resume")}
    settings = yaml.safe_dump(_without_places(without_paths), sort_keys=False, allow_unicode=True)
    versions = environment.get("versions", {})
    return "\n".join(
        [
            f"# {_one_line(run.name)}",
            "",
            f"Trained from {_one_line(_without_places(str(config['model']['name'])))} with Group Relative Policy "
            f"Optimization (arXiv 2402.03300), {max(run.metrics.steps) if step is None else step} steps.",
            "",
            f"Licence: {licence or 'not stated: ask before you use it'}.",
            "",
            "## Evaluation",
            "",
            *evaluation,
            "",
            "## Data",
            "",
            *(f"- {_one_line(str(key))}: {_one_line(str(value))}" for key, value in about.items()),
            "",
            "## Limits",
            "",
            "The rewards below are all that it was trained for; nothing else about its answers was measured.",
            "",
            "## Settings",
            "",
            *_fenced_whole(settings),
            "",
            "Commit "
            + _one_line(str(environment.get("git_commit")))
            + "; "
            + ", ".join(f"{_one_line(str(name))} {_one_line(str(value))}" for name, value in versions.items() if value),
            "",
        ]
    )


def _fenced_whole(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = fenced("")[0].removesuffix("text") + "`" * longest
    return [fence + "yaml", visible(text).rstrip(), fence]


def _one_line(text: str) -> str:
    """Escape Markdown and HTML in a text, and shorten it to one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", visible(text).replace("\n", " "))[:300]


def _without_places(value: Any) -> Any:
    """Replace absolute paths by their last part, for privacy."""
    if isinstance(value, dict):
        return {_without_places(key): _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _hub_id(name: str) -> str | None:
    """Return the name of a base model on the hub; None for a local folder, whose path is private."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
