"""Tiny model: a small model and its tokenizer, made locally without a download, for `model.name: starter`.

    problems -> BPE tokenizer -> random Qwen2 -> short supervised warm-up -> Hugging Face folder in the cache

The warm-up texts are two kinds of solutions, both with true answers. Careful ones compute line by line, which the model
can learn. Hasty ones, twice as many, give the answer at once, which it cannot compute. So after the warm-up the model
is mostly hasty and mostly wrong, and GRPO has to find that reasoning pays. Data and reward favour it in no other way.
"""

import dataclasses
import hashlib
import json
import logging
import math
import random
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo.config.schema import Config
from grpo.data.arithmetic import generate_problems
from grpo.data.invented_language import unmarked
from grpo.data.multiplication import generate_products
from grpo.data.rows import Example
from grpo.errors import StorageError
from grpo.rewards.text_match import quoted_terms
from grpo.runtime.storage import cache_folders, share_mode

log = logging.getLogger(__name__)

VERSION = 2
"""Part of the cache key: raise it when a change here gives another model for the same recipe."""
END, PAD = "<|end|>", "<|pad|>"
TAGS = ("<reasoning>\n", "\n</reasoning>\n", "<answer>\n", "\n</answer>\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the tiny model, and its warm-up."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    key_value_heads: int | None = None
    """None = the number of heads."""
    vocabulary: int = 600
    problems: int = 20_000
    steps: int = 400
    batch: int = 48
    learning_rate: float = 3e-3
    hasty_fraction: float = 0.67
    """Fraction of hasty solutions among the warm-up texts."""
    formatted_fraction: float = 1.0
    """Fraction of warm-up texts in the full XML format; the others omit parts of it."""
    longest: int = 192
    """Longer warm-up texts, in tokens, are left out."""


@dataclass(frozen=True)
class ProseRecipe(Recipe):
    """Recipe for answers in prose. Careful texts are whole answers, hasty ones only their quoted terms."""

    unmarked_fraction: float = 0.0
    """Fraction of hasty texts without diacritics ("tagah" for "tâgaẖ"). The model then knows both spellings, and has to
    learn from the reward which one is right."""


@dataclass(frozen=True)
class ToolRecipe(Recipe):
    """Recipe for products. Careful texts call the calculator and give its result, hasty ones give the answer at once.

    All answers are true, but only those with a call can be learned.
    """

    call: tuple[str, str] = ('<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>')
    """Text around the expression of a call; each part is one token."""


TOOL_RECIPE = ToolRecipe(vocabulary=500, steps=900)
GSM8K_RECIPE = Recipe(vocabulary=4096, steps=300, batch=32, hasty_fraction=0.5, formatted_fraction=0.3, longest=224)
PROSE_RECIPE = ProseRecipe(vocabulary=450, steps=500, unmarked_fraction=0.75)


def tiny_model_for(config: Config, rows: list[Example]) -> Path:
    """Return the folder of the tiny model of a run, made from its training rows, or from generated arithmetic."""
    if notice := demonstration_notice(config):
        log.info(notice)
    problems = None
    if config.data.name != "arithmetic":
        problems = [{"question": _question(row, config), "answer": _worked_answer(row)} for row in rows]
    recipe = recipe_for(problems, unmarked=config.data.name == "invented_language")
    if config.data.name == "multiplication":  # many more than are trained on: none is learned by heart
        recipe = TOOL_RECIPE
        problems = generate_products(recipe.problems, seed=config.seed, split="train")
    return make_tiny_model(seed=config.seed, problems=problems, recipe=recipe)


def _question(row: Example, config: Config) -> str:
    return str(row.columns.get("question", row.columns.get(config.data.question, "")))


def _worked_answer(row: Example) -> str:
    return str(row.columns.get("solution") or row.columns["answer"])


def make_tiny_model(
    *,
    seed: int,
    problems: list[dict[str, str]] | None = None,
    cache: Path | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Return the tiny model's folder, made once for each seed, recipe and text and then cached.

    Args:
        problems: Rows with `question` and `answer`: worked answers with `#### N` at the end (calculator annotations
            like <<3+4=7>> are removed), or prose. None = generated arithmetic.
        cache: Folder of the cache. None = the environment variable GRPO_CACHE, or ~/.cache/grpo. Files are checked
            against their checksums, and a damaged folder is made again.
        recipe: None = chosen by the form of the answers.
    """
    recipe = recipe or recipe_for(problems)
    rows = generate_problems(recipe.problems, seed=seed, split="train") if problems is None else problems
    text = json.dumps(rows, sort_keys=True)
    identity = json.dumps([VERSION, seed, dataclasses.asdict(recipe), hashlib.sha256(text.encode()).hexdigest()])
    name = f"starter-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    failed: OSError | None = None
    for root in [cache] if cache is not None else cache_folders():
        try:
            return _find_or_make(root / name, seed, rows, recipe)
        except OSError as error:
            failed = error
    raise StorageError(
        f"the tiny model (model.name starter) cannot be cached: {failed}. Set GRPO_CACHE to a folder that this user "
        "can write, with 20 MB of free space"
    )


def _find_or_make(folder: Path, seed: int, rows: list[dict[str, str]], recipe: Recipe) -> Path:
    """Return the folder of the cached model, made first where it is missing or damaged.

    Raises:
        OSError: The cache cannot be read or written.
    """
    if folder.exists():
        damage = _damage(folder)
        if damage is None:
            return folder
        log.info("the cached tiny model is damaged (%s): making it again", damage)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".starter-", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "new"
        made.mkdir()
        try:
            _make(made, seed, rows, recipe)
        except SafetensorError as error:  # it hides the error of the system
            raise OSError(str(error)) from error
        share_mode(made)
        try:
            made.rename(folder)
        except OSError:
            if _damage(folder) is not None:  # otherwise another process has made the same one
                raise
    return folder


def recipe_for(problems: list[dict[str, str]] | None, *, unmarked: bool = False) -> Recipe:
    """Return the recipe for generated arithmetic (None), worked answers or prose.

    Args:
        problems: Rows with `question` and `answer`.
        unmarked: Spell terms of prose without diacritics in some texts. Only for the invented language, where training
            has to find the right spelling: a model of your own data reads it as it is written.
    """
    if problems is None:
        return Recipe()
    if any("####" in row["answer"] for row in problems):
        return GSM8K_RECIPE
    return PROSE_RECIPE if unmarked else dataclasses.replace(PROSE_RECIPE, unmarked_fraction=0.0)


def demonstration_notice(config: Config) -> str | None:
    """Return what the tiny model is for, where it is trained on a file of one's own; otherwise None."""
    if config.model.name != "starter" or config.data.path is None:
        return None
    return (
        "model.name starter is a demonstration: a model of about a million parameters, made from your rows in a "
        "minute. It shows that data, rewards and config work, and knows nothing else. For results, set a pretrained "
        "model: --model.name Qwen/Qwen2.5-0.5B-Instruct (or another hub id or folder), or `python launch/fetch.py "
        "smollm2` and --model.name models/SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def _make(folder: Path, seed: int, rows: list[dict[str, str]], recipe: Recipe) -> None:
    started = time.perf_counter()
    rng = random.Random(f"starter {seed}")
    if isinstance(recipe, ToolRecipe):
        texts = [text for row in rows for text in tool_texts(row, recipe, rng)]
    else:
        texts = [(row["question"], completion_text(row["answer"], recipe, rng)) for row in rows]
    tags = (*TAGS, *recipe.call, "<|tool|>") if isinstance(recipe, ToolRecipe) else TAGS
    digits = 1 if isinstance(recipe, ToolRecipe) else 2  # as transformers loads the tokenizer of a Qwen2
    tokenizer = make_tokenizer([part for text in texts for part in text], recipe.vocabulary, tags, digits)
    torch.manual_seed(seed)
    model = make_model(tokenizer, recipe)
    size = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "making the tiny model: %.1fM parameters, %d supervised steps on %d texts", size / 1e6, recipe.steps, len(texts)
    )
    loss = warm_up(model, tokenizer, texts, recipe, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    record = {
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "warm_up_loss": loss,
        "seconds": time.perf_counter() - started,
        "sha256": files,
    }
    (folder / "starter.json").write_text(json.dumps(record, indent=2))
    log.info("the tiny model is ready after %.0f s, and cached", record["seconds"])


def completion_text(answer: str, recipe: Recipe, rng: random.Random) -> str:
    """Return a worked answer as a completion in the XML format: all its lines, or, hasty, the result alone.

    Prose is returned as it is, or, hasty, as its quoted terms, with or without diacritics.
    """
    if isinstance(recipe, ProseRecipe):
        if rng.random() >= recipe.hasty_fraction:
            return answer
        short = " ".join(f"`{term}`" for term in quoted_terms(answer)) or answer
        return unmarked(short) if rng.random() < recipe.unmarked_fraction else short
    worked, _, result = re.sub(r"<<.*?>>", "", answer).rpartition("####")
    result = result.strip()
    reasoning = f"So {result}." if rng.random() < recipe.hasty_fraction else worked.strip()
    if rng.random() < recipe.formatted_fraction:
        return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{result}\n</answer>\n"
    return rng.choice(
        [
            f"{reasoning}\n{result}\n",
            f"<reasoning>\n{reasoning}\n{result}\n",
            f"{reasoning}\n<answer>\n{result}\n</answer>\n",
            f"<reasoning>\n{reasoning}\n</reasoning>\n{result}\n",
        ]
    )


def tool_texts(row: dict[str, str], recipe: ToolRecipe, rng: random.Random) -> list[tuple[str, str]]:
    """Return the turns of a product as (what the model reads, its turn): one with the answer, or a call and the answer.

    The second turn follows a conversation of its own, in the form of CHAT_TEMPLATE.
    """
    question, (worked, _, result) = row["question"], row["answer"].rpartition("####")
    answer = f"<answer>\n{result.strip()}\n</answer>\n"
    if rng.random() < recipe.hasty_fraction:
        return [(question, answer)]
    call = worked.partition("=")[0].strip().join(recipe.call)
    return [(question, call), (f"{question}<|assistant|>{call}{END}<|tool|>{result.strip()}", answer)]


def make_tokenizer(
    texts: list[str], vocabulary: int, tags: tuple[str, ...] = TAGS, digits: int = 2
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes up to `digits` digits as one token, and each of `tags`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    special = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    # Without an unk_token, AutoTokenizer would add that of Qwen2, which has no embedding. Every byte is a token, so
    # that none is ever unknown.
    special_tokens = {"eos_token": END, "pad_token": PAD, "unk_token": PAD}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special_tokens)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> PreTrainedModel:
    """Return a small, randomly initialised Qwen2."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads or recipe.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return model


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[tuple[str, str]],
    recipe: Recipe,
    rng: random.Random,
) -> float:
    """Train on (question, completion) pairs, with the loss on completion tokens only. Returns the last loss."""
    examples = []
    for question, completion in texts:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= recipe.longest:
            examples.append((ids, len(prompt_ids)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = max(1, recipe.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / ramp, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    loss = 0.0
    for step in range(recipe.steps):
        batch = rng.sample(examples, min(recipe.batch, len(examples)))
        width = max(len(ids) for ids, _ in batch)
        inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch])
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
        counted = labels[:, 1:] != -100
        # Right padding needs no mask under causal attention, and only completion positions go through the head.
        value = F.cross_entropy(model.lm_head(hidden[counted]), labels[:, 1:][counted])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        loss = float(value.detach())
        if (step + 1) % max(1, recipe.steps // 5) == 0:
            log.info("  warm-up step %d of %d: loss %.3f", step + 1, recipe.steps, loss)
    model.eval()
    return loss


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cached folder; None if nothing is."""
    try:
        files = json.loads((folder / "starter.json").read_text())["sha256"]
        for name, expected in files.items():
            if _checksum(folder / name) != expected:
                return f"{name} has changed"
        load_file(folder / "model.safetensors")
    except PermissionError:  # another user's: no damage
        raise
    except Exception as error:
        return repr(error)
    return None
