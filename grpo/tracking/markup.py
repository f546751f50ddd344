"""Markup: untrusted text -> HTML and Markdown that show it as text."""

import html

from grpo.runtime.messages import visible


def inert(text: object) -> str:
    """Escape a text for HTML."""
    return html.escape(visible(str(text)))


def plain_markdown(text: str) -> str:
    """Return a text as inline code of Markdown, on one line of at most 300 characters."""
    return "`" + visible(text).replace("`", "'").replace("\n", " ")[:300] + "`"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table."""
    head = "".join(f"<th>{inert(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{inert(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
