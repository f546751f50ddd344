import pytest
import torch

from grpo.kernels.attention import PackedLayout
from grpo.models.logprob_model import LogprobModel
from grpo.models.padded_rows import pack_rows
from grpo.packing import pack
from tests.fakes import FAMILIES, group, tiny_model, use_slow_varlen

pytestmark = pytest.mark.usefixtures("way")


def test_the_worked_example() -> None:
    batch = pack([group(0, [5, 6], [[7, 8], [9]])], torch.tensor([[1.0, -1.0]]), max_tokens=100)[0]
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 2]
    assert batch.tokens_N.tolist() == [7, 8, 9]
    assert batch.predictor_N.tolist() == [1, 2, 1]
    assert batch.sequence_N.tolist() == [0, 0, 1]
    assert batch.advantages_N.tolist() == [1, 1, -1]
    assert batch.lengths_S.tolist() == [2, 1]


def test_a_group_is_split_under_the_budget_and_nothing_is_lost() -> None:
    groups = [group(0, [5, 6], [[7, 8], [9], [10, 11, 12]]), group(1, [13], [[14], [15, 16]])]
    batches = pack(groups, torch.ones(2, 3), max_tokens=6)
    assert all(len(batch.input_ids_T) <= 6 for batch in batches)
    assert sorted(token for batch in batches for token in batch.tokens_N.tolist()) == [7, 8, 9, 10, 11, 12, 14, 15, 16]
    with pytest.raises(ValueError, match="raise tokens_per_batch"):
        pack(groups, torch.ones(2, 3), max_tokens=4)


def test_tokens_keep_their_advantage_wherever_they_are_laid() -> None:
    """Two groups of two completions, one left out: advantages follow the completions, not their places."""
    groups = [group(0, [5, 6], [[7, 8], [9]]), group(1, [13], [[14], [15, 16]])]
    batches = pack(groups, torch.tensor([[0.0, 1.0], [2.0, 3.0]]), max_tokens=5, skip_flat=True)
    got = {
        token: advantage
        for batch in batches
        for token, advantage in zip(batch.tokens_N.tolist(), batch.advantages_N.tolist(), strict=True)
    }
    assert got == {9: 1, 14: 2, 15: 3, 16: 3}


def test_masks_and_skips() -> None:
    cut = group(0, [5], [[6], [7]], ended=False)
    assert pack([cut], torch.ones(1, 2), max_tokens=9, mask_truncated=True)[0].weights_N.tolist() == [0, 0]
    kept = pack([group(0, [5], [[6], [7]])], torch.tensor([[0.0, 1.0]]), max_tokens=9, skip_flat=True)[0]
    assert kept.tokens_N.tolist() == [7]
    assert pack([cut], torch.zeros(1, 2), max_tokens=9, skip_flat=True) == []
    # Only exactly 0 is left out: however small, another advantage has a gradient.
    tiny = pack([group(0, [5], [[6], [7]])], torch.tensor([[-1e-12, 1e-9]]), max_tokens=9, skip_flat=True)[0]
    assert tiny.tokens_N.tolist() == [6, 7] and tiny.advantages_N.tolist() == pytest.approx([-1e-12, 1e-9])
    ended = group(0, [5], [[6], [7]])
    assert pack([ended], torch.ones(1, 2), max_tokens=9, mask_truncated=True)[0].weights_N.tolist() == [1, 1]


@pytest.mark.parametrize("attention", ["as on a CPU", "padded", "in one call"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_sequence_at_a_time_in_values_and_gradients(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLayout, "one_by_one", attention == "as on a CPU")
    model = tiny_model(family, spread=2.0)
    torch.manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 40, (length,)).tolist()

    groups = [group(0, ids(5), [ids(4), ids(9), ids(1)]), group(1, ids(2), [ids(6), ids(3), ids(3)])]
    batch = pack(groups, torch.ones(2, 3), max_tokens=1000)[0]
    calls = use_slow_varlen(monkeypatch) if attention == "in one call" else []
    on_cpu = attention == "as on a CPU"
    packed = LogprobModel(model, uses_packed_attention=True, temperature=0.9, uses_kernels=on_cpu)(batch)[0]
    packed.sum().backward()
    assert calls == ([8] * model.config.num_hidden_layers if attention == "in one call" else [])
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation("sdpa")
    expected = []
    for one in groups:
        for completion in one.completions:
            row = torch.tensor([[*one.prompt.token_ids, *completion.token_ids]])
            scores = torch.log_softmax(model(row, use_cache=False).logits[0, :-1] / 0.9, -1)
            start = len(one.prompt.token_ids) - 1
            expected.append(scores[start:].gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1))
    torch.cat(expected).sum().backward()

    assert torch.allclose(packed, torch.cat(expected), atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert float((ours[name] - parameter.grad).abs().max()) <= 1e-5 * scale, name


def test_a_token_of_one_completion_moves_no_other() -> None:
    model = tiny_model()
    logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=1.0)
    first = pack([group(0, [5, 6], [[7, 8], [9, 10]])], torch.ones(1, 2), max_tokens=99)[0]
    second = pack([group(0, [5, 6], [[7, 30], [9, 10]])], torch.ones(1, 2), max_tokens=99)[0]
    with torch.no_grad():
        assert torch.equal(logprob_model(first)[0][2:], logprob_model(second)[0][2:])


def test_rows_are_the_same_sequences() -> None:
    model = tiny_model()
    batch = pack([group(0, [5, 6], [[7, 8], [9]]), group(1, [4], [[3, 2, 9], [8]])], torch.ones(2, 2), max_tokens=99)[0]
    with torch.no_grad():
        packed = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]
        rows = LogprobModel(model, uses_packed_attention=False, temperature=1.0)(batch)[0]
    assert torch.allclose(packed, rows, atol=1e-5)


def test_the_budget_of_padded_rows_is_their_rectangle() -> None:
    """Rows of 9, 8, 5, 3, 3 and 2 tokens, at most 16 in a batch: one row of 9; 8 and 5 (16); 3, 3 and 2 (9)."""
    groups = [group(0, [5, 6], [[7] * 7, [8], [9] * 3]), group(1, [10], [[11], [12] * 2, [13] * 7])]
    advantages_PG = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    batches = pack_rows(groups, advantages_PG, max_tokens=16)
    shapes = [tuple(batch.rows()[0].shape) for batch in batches]
    assert shapes == [(1, 9), (2, 8), (3, 3)]
    assert [batch.completion_S.tolist() for batch in batches] == [[0], [2, 5], [1, 3, 4]]
    assert [batch.advantages_N.tolist() for batch in batches] == [[1] * 7, [3] * 3 + [6] * 7, [2, 4, 5, 5]]
    rows, predictor = batches[1].rows()
    assert rows.tolist() == [[5, 6, 9, 9, 9, 0, 0, 0], [10, 13, 13, 13, 13, 13, 13, 13]]
    assert predictor.tolist() == [1, 2, 3, 8, 9, 10, 11, 12, 13, 14]
    with pytest.raises(ValueError, match="a prompt and a completion of 9 tokens exceed tokens_per_batch 8"):
        pack_rows(groups, max_tokens=8)
    left = pack_rows(groups, advantages_PG - 2, max_tokens=16, skip_flat=True)
    assert [batch.completion_S.tolist() for batch in left] == [[0], [2, 5], [3, 4]]
    assert pack_rows([], max_tokens=1) == []
    # The budget of packed rows alone would let them grow to 4 rows of 9 tokens.
    assert [batch.rows()[0].numel() for batch in pack(groups, max_tokens=16)] == [36, 16]
