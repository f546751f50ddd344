"""Markup: what others wrote -> HTML and Markdown in which it stays text."""

import html

from grpo.runtime.messages import visible


def inert(text: object) -> str:
    """Text inside HTML that stays text."""
    return html.escape(visible(str(text)))


def plain_markdown(text: str) -> str:
    return "`" + visible(text).replace("`", "'").replace("\n", " ")[:300] + "`"


def table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{inert(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{inert(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
