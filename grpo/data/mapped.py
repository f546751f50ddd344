"""Large data: prompts in an Arrow file that is memory-mapped, written once and found again.

    rows.jsonl  --validate, tokenise in chunks-->  ~/.cache/grpo/prompts-<key>/prompts.arrow + prompts.json
    MappedPrompts(folder)[60_000]  -->  Prompt     only the pages that are read are loaded

The key is a hash of the file's bytes, the relevant settings and the tokenizer: a change of any of them uses another
folder. A damaged Arrow file is written again.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from grpo.config.schema import DataConfig
from grpo.data.prompts import shown_examples
from grpo.data.rendering import prompts_token_ids, template_arguments
from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.runtime.storage import cache_root
from grpo.types import Prompt

VERSION = 2
"""Part of the key: raise it when a change here gives other prompts for the same file."""
MAP_FROM_BYTES = 8_000_000
"""Smaller files are kept in memory with data.cache auto."""
CHUNK = 1000
"""Rows that are tokenised in one call."""


class MappedPrompts(Sequence[Prompt]):
    """Sequence of the prompts in a folder that `map_prompts` has written."""

    def __init__(self, folder: Path):
        from datasets import Dataset

        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        self._table = Dataset.from_file(str(folder / "prompts.arrow"))

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        row = self._table[index]
        return Prompt(row["draw"], json.loads(row["messages"]), tuple(row["token_ids"]), json.loads(row["columns"]))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))


class UnstorableError(ConfigError):
    """A column that JSON cannot hold, such as a picture. Under data.cache auto, the prompts stay in memory."""


def token_ids_of(prompts: Sequence[Prompt]) -> Iterator[Sequence[int]]:
    """Iterate over the token ids of prompts, without their other columns."""
    if isinstance(prompts, MappedPrompts):
        for batch in prompts._table.select_columns(["token_ids"]).iter(CHUNK):
            yield from batch["token_ids"]
    else:
        yield from (prompt.token_ids for prompt in prompts)


def wants_mapping(data: DataConfig) -> bool:
    """Return whether data.path is a local file that data.cache says to map."""
    if data.cache == "never" or data.path is None or not Path(data.path).expanduser().is_file():
        return False
    return data.cache == "always" or Path(data.path).expanduser().stat().st_size >= MAP_FROM_BYTES


def mapped_folder(data: DataConfig, tokenizer: Any) -> Path:
    """Return the folder for the prompts of this file, these settings and this tokenizer."""
    assert data.path is not None
    digest = hashlib.sha256()
    with Path(data.path).expanduser().open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    matters = dataclasses.asdict(data)
    for name in ("path", "eval_path", "eval_size", "eval_split", "cache"):
        matters.pop(name, None)
    matters["examples"] = shown_examples(data)
    vocabulary = getattr(tokenizer, "backend_tokenizer", None)
    identity = [
        *(VERSION, digest.hexdigest(), matters, tokenizer.chat_template),
        vocabulary.to_str() if vocabulary is not None else repr(sorted(tokenizer.get_vocab().items())),
    ]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / f"prompts-{key}"


def open_mapped(folder: Path) -> MappedPrompts | None:
    """Return the folder's prompts. Where they are missing or damaged, remove the folder and return None.

    Prompts that this user may not read are neither.
    """
    try:
        record = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        if _checksum(folder / "prompts.arrow") == record["sha256"]:
            return MappedPrompts(folder)
    except PermissionError:
        return None
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def map_prompts(
    folder: Path,
    examples: Sequence[Example],
    tokenizer: Any,
    max_prompt_length: int | None,
    rejected: list[dict[str, str]],
) -> MappedPrompts:
    """Tokenise the examples in chunks and write `folder` atomically. The prompts equal those of `render_prompts`."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "draw": Value("int64"),
            "messages": Value("string"),
            "token_ids": List(Value("int32")),
            "columns": Value("string"),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prompts-", ignore_cleanup_errors=True) as temporary:
        arrow = Path(temporary) / "new" / "prompts.arrow"
        arrow.parent.mkdir()
        kept, shortest = 0, None
        with ArrowWriter(features=features, path=str(arrow), writer_batch_size=CHUNK) as writer:
            for start in range(0, len(examples), CHUNK):
                chunk = examples[start : start + CHUNK]
                arguments = [template_arguments(example.columns) for example in chunk]
                many = prompts_token_ids([example.messages for example in chunk], tokenizer, arguments)
                for offset, ids in enumerate(many):
                    shortest = len(ids) if shortest is None else min(shortest, len(ids))
                    if max_prompt_length is None or len(ids) <= max_prompt_length:
                        example = chunk[offset]
                        texts = (_json(example.messages), _json(example.columns))
                        writer.write(
                            {"draw": start + offset, "messages": texts[0], "token_ids": ids, "columns": texts[1]}
                        )
                        kept += 1
            if not kept:
                raise ConfigError(
                    f"data.max_prompt_length is {max_prompt_length}, which leaves none of the {len(examples)} prompts "
                    f"(the shortest has {shortest} tokens): raise it"
                )
            writer.finalize()
        record = {
            "prompts": kept,
            "dropped": len(examples) - kept,
            "columns": sorted(examples[0].columns),
            "rejected": rejected,
            "sha256": _checksum(arrow),
        }
        (arrow.parent / "prompts.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        try:
            arrow.parent.rename(folder)
        except OSError:
            if open_mapped(folder) is None:  # otherwise another process has written the same one
                raise
    return MappedPrompts(folder)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=True)
    except TypeError as error:
        raise UnstorableError(f"data.cache: a column cannot be stored ({error}): set data.cache never") from error


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
