"""Texts: YAML files and flags -> plain values. Nothing is altered silently: what is no plain number stays text."""

import re
from typing import Any

import yaml

from grpo.config.values import members_of

NULLS = ("null", "Null", "NULL", "~")
"""Texts that mean no value, in YAML and in flags."""


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and alters no value: 5e-6 is a number; 010, 1:30 and dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def read_text(text: str, kind: Any) -> Any:
    """Return the value of a flag: as YAML would read it, but text is taken literally.

    null -> None    --steps 3 -> 3    --data.system_prompt "# Be brief" -> "# Be brief"    --rewards "{accuracy: 1}"

    Args:
        text: The text of the flag.
        kind: The declared type.

    Raises:
        yaml.YAMLError: A list or a mapping in brackets is not valid.
    """
    if text in NULLS:
        return None
    members = members_of(kind)
    rows = list[dict[str, Any]] in members and text.lstrip()[:1] == "["
    if str in members and not rows:
        return text
    if text.lstrip()[:1] in ("[", "{"):
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    try:
        value = yaml.load(text, Loader=StrictLoader)  # noqa: S506
    except yaml.YAMLError:
        return text
    if isinstance(value, bool | int | float):
        return value
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return value if quoted else text  # "# a" would be None, and "a # b" only "a"
