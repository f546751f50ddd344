"""Data card: source, licence and permission of the data. A YAML file beside the data, or data.card.

    source: Recorded by the language committee, 2019-2024
    licence: CC-BY-NC-4.0
    permission: granted            granted | unknown | prohibited
    permission_from: Language committee, letter of 2025-03-01
    steward: committee@example.org
    contact, withdrawal, notes     optional

`prohibited` stops training unless the user states that they have permission (data.i_have_permission). `unknown` warns.
Local data needs a card before a model that was trained on it is published. A run directory records its card
(data_card.json), `publishable` checks that record, and the model card shows it. A program cannot verify the permission:
the card makes the question hard to forget.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from grpo.config.schema import DataConfig
from grpo.errors import ConfigError, StorageError

NEEDED = ("source", "licence", "permission")
KNOWN = (*NEEDED, "permission_from", "steward", "contact", "withdrawal", "language", "notes")
PERMISSIONS = ("granted", "unknown", "prohibited")


def find_card(data: DataConfig) -> Path | None:
    """Return data.card, or FILE.card.yaml or data_card.yaml beside data.path; None without one."""
    if data.card is not None:
        path = Path(data.card).expanduser()
        if not path.is_file():
            raise ConfigError(f"data.card: there is no file {data.card}")
        return path
    if data.path is None:
        return None
    file = Path(data.path).expanduser()
    folder = file if file.is_dir() else file.parent
    beside = [file.with_name(file.name + ".card.yaml"), folder / "data_card.yaml"]
    return next((path for path in beside if path.is_file()), None)


def read_card(path: Path) -> dict[str, str]:
    """Return the card's fields as text. Raises ConfigError, naming a field that is missing or wrong."""
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"data card {path} cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ConfigError(f"data card {path} must hold 'field: text' lines")
    for name in NEEDED:
        if not str(card.get(name) or "").strip():
            raise ConfigError(f"data card {path}: '{name}' is missing; it needs {', '.join(NEEDED)}")
    unknown = sorted(set(map(str, card)) - set(KNOWN))
    if unknown:
        raise ConfigError(f"data card {path}: unknown field '{unknown[0]}', it can have {', '.join(KNOWN)}")
    if card["permission"] not in PERMISSIONS:
        raise ConfigError(
            f"data card {path}: permission is '{card['permission']}', it must be one of {', '.join(PERMISSIONS)}"
        )
    return {name: str(card[name]).strip() for name in KNOWN if str(card.get(name) or "").strip()}


def check_permission(data: DataConfig) -> str | None:
    """Return a warning for data of unknown permission, else None. Raises ConfigError if the card prohibits training."""
    path = find_card(data)
    if path is None:
        return None
    card = read_card(path)
    if card["permission"] == "prohibited" and not data.i_have_permission:
        steward = f" ({card['steward']})" if "steward" in card else ""
        raise ConfigError(
            f"data card {path}: permission is prohibited. Ask its stewards{steward}. If they have given you "
            f"permission, state it with --data.i_have_permission true; the model card will show it"
        )
    if card["permission"] == "unknown":
        return f"data card {path}: permission is unknown. Ask before you publish a model that was trained on it"
    return None


RECORD = "data_card.json"
"""File in a run directory that records the data card."""
GENERATED = ("arithmetic", "invented_language")


def is_local(data: DataConfig) -> bool:
    """Return whether the data is not public: a local file or folder, or the rows of a custom dataset function."""
    if data.path is not None:
        return Path(data.path).expanduser().exists()
    return data.name not in ("gsm8k", *GENERATED)


def record_card(folder: Path, data: DataConfig) -> None:
    """Write data_card.json into the run directory: the card at training time, and data.i_have_permission.

    The data may have moved by the time the model is published, so the record stays with the run.
    """
    path = find_card(data)
    record = {
        "data": data.path if data.path is not None else data.name,
        "local": is_local(data),
        "generated": data.path is None and data.name in GENERATED,
        "card": read_card(path) if path is not None else None,
        "i_have_permission": data.i_have_permission,
    }
    try:
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {folder / RECORD}: {error}") from error


def card_of_run(run_dir: Path) -> dict[str, str]:
    """Return the recorded fields for a model card: data, source, licence, permission, ...; {} without a record."""
    record = _record(run_dir)
    if record is None:
        return {}
    shown = {"data": Path(record["data"]).name if record["local"] else str(record["data"])}
    if record["card"] is not None:
        shown |= {name: str(text) for name, text in record["card"].items()}
    elif record["generated"]:
        shown |= {
            "source": "generated by the trainer itself",
            "licence": "that of the trainer",
            "permission": "granted",
        }
    if record["i_have_permission"] and shown.get("permission") != "granted":
        stated = shown.get("permission", "not stated")
        shown["permission"] = f"{stated}; the person who trained this model stated that they have permission"
    return shown


def publishable(run_dir: Path) -> dict[str, str]:
    """Return the fields for the model card if the run's model may be published.

    Raises:
        ConfigError: The run has no record, or its local data has no card that grants permission and nobody has stated
            that they have it.
    """
    record = _record(run_dir)
    if record is None:
        raise ConfigError(
            f"{run_dir} has no {RECORD}, which records the data of its model: publish from the run directory"
        )
    card = record["card"]
    if record["local"] and card is None:
        raise ConfigError(
            f"{run_dir}: the model was trained on local data without a data card ({record['data']}). To publish a "
            f"model, write {record['data']}.card.yaml with source, licence and permission, and train with it"
        )
    if card is not None and card["permission"] != "granted" and not record["i_have_permission"]:
        raise ConfigError(
            f"{run_dir}: the data card has permission: {card['permission']}. To publish, it must be granted, or the "
            f"model trained with --data.i_have_permission true, which states that you have permission"
        )
    return card_of_run(run_dir)


def _record(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("data", "local", "generated", "card", "i_have_permission")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error
