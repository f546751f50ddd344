"""Finding: one line for the user about a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line for the user. `name` tells findings apart, so that each is reported once."""

    name: str
    text: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.text}: {self.suggestion}"

    def to_row(self) -> dict[str, str]:
        """Return the row of findings.jsonl. Its key "mend" is older than the term `suggestion`."""
        return {"name": self.name, "text": self.text, "mend": self.suggestion}
