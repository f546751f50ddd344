"""The comparison that chooses a backbone: it tells a wrong layer from one token that amplifies rounding."""

import torch

from grpo.models.architecture import probe_ids
from grpo.rollout.backbones import _distance


def test_one_chaotic_token_of_the_prefill_does_not_count_but_a_wrong_step_does() -> None:
    expected = torch.ones(2, 7, 4)
    close = expected * 1.01
    assert abs(_distance(close, expected) - 0.01) < 1e-6
    chaotic = close.clone()
    chaotic[0, 3] = -5.0
    assert abs(_distance(chaotic, expected) - 0.01) < 1e-6
    wrong_step = close.clone()
    wrong_step[:, -1] = 2.0
    assert abs(_distance(wrong_step, expected) - 1.0) < 1e-6
    wrong_prefill = close.clone()
    wrong_prefill[:, :-1] = 0.5
    assert abs(_distance(wrong_prefill, expected) - 0.5) < 1e-6


def test_probed_ids_are_spread_over_the_vocabulary() -> None:
    assert probe_ids(3, 100).tolist() == [25, 50, 75]
    assert len(set(probe_ids(17, 374).tolist())) == 17 and int(probe_ids(17, 374).max()) < 374
