"""A tokenizer with a chat template for tests of several turns: characters, and special tokens of turns.

The templates here are short ones of the kinds that common models have. Those of Qwen2.5, Qwen3 and Llama 3.2 themselves
are read from an installed TRL (`published_template`).
"""

from importlib.resources import files
from importlib.util import find_spec

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<end>", "<pad>", "<user>", "<assistant>", "<tool>", "<system>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = r"""
{%- macro turn(role, text) %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endmacro %}
{%- if messages[0].role != 'system' %}{{ turn('system', 'Be helpful.') }}{% endif %}
{%- for one in messages %}{{ turn(one.role, one.content) }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""No place for tools, and a system message of its own, as SmolLM2's."""
TAGS = r"""
{%- macro shown(call) %}{{ '<tool_call>\n' }}{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
{{- '\n</tool_call>' }}{% endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\nFunctions:\n' ~ tools | map('tojson') | join('\n') }}
    {{- '\nCall one: <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for one in messages %}{% if one.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
{%- for one in messages %}
    {%- if one.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' ~ one.content ~ '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' ~ one.role ~ '\n' ~ TEXT }}
        {%- for call in one.tool_calls or [] %}{{ shown(call.function or call) }}{% endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}THOUGHT{% endif %}
"""
KINDS = {
    "plain": PLAIN,
    # Calls and results between tags, as Qwen2.5's.
    "tags": TAGS.replace("TEXT", "one.content").replace("THOUGHT", ""),
    # The thinking of turns before the user's last message is left out, and a prompt may end with an empty thought, as
    # Qwen3's.
    "thinking": TAGS.replace(
        "TEXT", "(one.content.split('</think>')[-1].lstrip() if loop.index0 < asked.last else one.content)"
    ).replace("THOUGHT", r"{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"),
    # A call is the whole turn, and the tools are in the user's first message, as Llama 3.2's.
    "json": r"""
{%- macro head(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}{% endmacro %}
{{- bos_token }}{{ head('system') }}Be brief.<|eot_id|>
{%- for one in messages %}
    {%- if one.role == 'tool' %}
        {{- head('ipython') ~ one.content | tojson }}
    {%- elif one.tool_calls %}
        {%- set call = one.tool_calls[0].function %}
        {{- head(one.role) }}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
    {%- else %}
        {{- head(one.role) }}
        {%- if tools and loop.first %}
            {{- 'Functions:\n' ~ tools | map('tojson') | join('\n') }}
            {{- '\nCall one: {"name": ..., "parameters": {...}}\n\n' }}
        {%- endif %}
        {{- one.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}
""",
}
"""Kind -> chat template."""


def published_template(name: str) -> str:
    """Return a chat template that TRL ships: qwen2_5, qwen3, llama3_2. Skips the test without TRL."""
    if find_spec("trl") is None:
        pytest.skip('the chat templates are read from TRL: pip install -e ".[benchmark]"')
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def template_named(name: str) -> str:
    """Return a template of KINDS, or one that TRL ships."""
    return KINDS[name] if name in KINDS else published_template(name)


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
