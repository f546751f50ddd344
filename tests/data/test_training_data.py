"""Training data: what is said of data that is too small."""

import pytest

from grpo.data.training_data import too_few_prompts


@pytest.mark.parametrize(
    ("count", "per_step", "says"),
    [
        (2, 8, "only 2 training prompts: the model will learn them by heart, and draws some .* in each step of 8. Add"),
        (1, 1, "only 1 training prompt: the model will learn it by heart. Add rows"),
        (9, 4, "only 9 training prompts: the model will learn them by heart. Add rows"),
        (20, 32, "only 20 training prompts: .* more than once in each step of 32"),
        (10, 8, None),
        (500, 8, None),
    ],
)
def test_data_of_a_few_rows_is_reported(count: int, per_step: int, says: str | None) -> None:
    import re

    found = too_few_prompts(count, per_step)
    assert len(found) == (says is not None)
    assert says is None or re.search(says, found[0])
