"""A tokenizer with a chat template for tests of several turns: characters, and special tokens of turns."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<end>", "<pad>", "<user>", "<assistant>", "<tool>", "<system>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"


def char_tokenizer(template: str = TEMPLATE, special: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of printable characters; the first special token ends a turn, the second pads."""
    special = special or SPECIAL
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=special[0], pad_token=special[1], unk_token="?"
    )
    tokenizer.chat_template = template
    return tokenizer
