"""The C functions compared with torch, number by number; and a machine without a compiler."""

import copy
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import grpo.kernels.cpu.attention
import grpo.kernels.cpu.compiler
import grpo.kernels.cpu.decode_step
import grpo.kernels.cpu.ops
import grpo.kernels.cpu.panels
from grpo.kernels.attention import GroupSpan, PackedLayout, grpo_attention
from grpo.kernels.cpu.compiler import compiled, library
from grpo.kernels.cpu.decode_step import CompiledDecoder
from grpo.kernels.cpu.fused_ops import rms_norm, rotate, swiglu
from grpo.kernels.cpu.panels import Panels
from grpo.kernels.decode import FusedDecoder
from grpo.kernels.head import softmax, softmax_backward
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.sampling import draw_tokens
from grpo.models.families import describe
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.rollout.backbones import Backbone, KernelBackbone, ModuleBackbone, choose_backbone
from grpo.rollout.sampling import counted_uniform
from tests.fakes import tiny_model

needs_a_compiler = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


def numbers(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).requires_grad_(grad)


def in_torch(monkeypatch: pytest.MonkeyPatch, call):  # type: ignore[no-untyped-def]
    with monkeypatch.context() as patch:
        patch.setattr(grpo.kernels.cpu.compiler, "compiled", lambda source, **functions: None)
        return call()


@needs_a_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (2, 300, 130)])
def test_norm_and_swiglu_equal_torch_in_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, threads: int, shape: tuple[int, ...]
) -> None:
    def everything() -> list[Tensor]:
        hidden, weight, upstream = numbers(*shape, scale=3), numbers(shape[-1]), numbers(*shape, grad=False)
        gate, up = numbers(*shape, scale=20), numbers(*shape, scale=0.5)
        normed, gated = rms_norm(hidden, weight, 1e-6), swiglu(gate, up)
        return [normed, gated, *torch.autograd.grad((normed * upstream + gated).sum(), [hidden, weight, gate, up])]

    monkeypatch.setattr(grpo.kernels.cpu.ops, "threads_for", lambda count: threads)
    for mine, theirs in zip(everything(), in_torch(monkeypatch, everything), strict=True):
        mine, theirs = mine.detach(), theirs.detach()
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@needs_a_compiler
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 8), (6, 2, 24), (2, 2, 32)])
def test_attention_equals_torch_in_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, threads: int, window: int | None, heads: int, key_heads: int, size: int
) -> None:
    """Four groups. The second and the last have prompts elsewhere. Gathered gradients of the third are added."""
    spans = [GroupSpan(0, 5, (7, 1, 33)), GroupSpan(46, 9, (4, 6)), GroupSpan(56, 3, (2,)), GroupSpan(61, 4, (3, 11))]
    tokens = 46 + 10 + 5 + 14

    def everything() -> list[Tensor]:
        query, upstream = numbers(1, tokens, heads, size, scale=3), numbers(1, heads, tokens, size, grad=False)
        key, value = numbers(1, tokens, key_heads, size, scale=2), numbers(1, tokens, key_heads, size, scale=0.5)
        prompt = numbers(1, key_heads, 9, size, scale=2), numbers(1, key_heads, 9, size, scale=0.3)
        other = numbers(1, key_heads, 4, size, scale=2), numbers(1, key_heads, 4, size, scale=0.7)
        leaves = numbers(1, key_heads, 3, size), numbers(1, key_heads, 3, size)
        for leaf in leaves:
            leaf.grad = numbers(1, key_heads, 3, size, scale=5 if leaf is leaves[0] else -2, grad=False)
        seen: list[Tensor] = []
        layout = PackedLayout(spans, torch.device("cpu"), elsewhere={1: iter([prompt]), 3: iter([other])})
        layout.watched[2] = lambda *them: seen.extend(tensor.detach().clone() for tensor in them) or leaves
        states = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        attended, _ = grpo_attention(torch.nn.Module(), *states, None, sliding_window=window, layout=layout)
        upstream = upstream.transpose(1, 2)
        return [attended, *seen, *torch.autograd.grad(attended, [query, key, value, *prompt, *other], upstream)]

    monkeypatch.setattr(grpo.kernels.cpu.attention, "threads_for", lambda count: threads)
    for mine, theirs in zip(everything(), in_torch(monkeypatch, everything), strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@needs_a_compiler
@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_rows_equals_the_plain_formula(window: int | None) -> None:
    query, key, value = (numbers(2, heads, 33, 16, scale=2) for heads in (4, 2, 2))
    mine = grpo_attention(torch.nn.Module(), query, key, value, None, sliding_window=window)[0].transpose(1, 2)
    place = torch.arange(33)
    visible = (place <= place[:, None]) & (place > place[:, None] - (window or 33))
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    gradients = (torch.autograd.grad(result.square().sum(), [query, key, value]) for result in (mine, theirs))
    assert torch.allclose(mine, theirs, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


@needs_a_compiler
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 2, 8), (700, 3, 24)])
def test_a_rotation_equals_torch_in_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int, heads: int, size: int
) -> None:
    def everything() -> list[Tensor]:
        states, upstream = numbers(tokens, heads, size), numbers(tokens, heads, size, grad=False)
        angles = numbers(tokens, size // 2, grad=False).repeat(1, 2)
        rotated = rotate(states, angles.cos(), angles.sin())
        return [rotated, *torch.autograd.grad((rotated * upstream).sum(), [states])]

    for mine, theirs in zip(everything(), in_torch(monkeypatch, everything), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("way", ["compiled", "torch"], indirect=True)
def test_gradients_are_added_where_they_belong_and_autograd_gives_the_same(way: str) -> None:
    """Two passes of a model with tied head and padding token: gradients added in place equal those of autograd."""
    plain = tiny_model("qwen2", tie_word_embeddings=True)
    plain.get_input_embeddings().padding_idx = 3
    twin = copy.deepcopy(plain)
    batch = probe_batch(plain.config.vocab_size)
    for model, in_place in ((plain, False), (twin, True)):
        logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=0.9)
        logprob_model.accumulate_grads_inplace = in_place
        for factor in (1.0, -3.0):
            logprobs, _ = logprob_model(batch)
            (logprobs * torch.arange(len(logprobs)) * factor).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert float((one.grad - other.grad).abs().max()) <= 1e-5 * float(one.grad.abs().max()), name


def test_the_softmax_of_extreme_logits() -> None:
    logits = torch.cat([numbers(5, 3001, scale=8, grad=False), torch.full((1, 3001), -90.0)])
    logits[0, 7], logits[5, 2] = 300.0, 20.0
    targets = torch.tensor([7, 0, 3000, 2999, 1, 5])
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    lse, logprobs, entropies = softmax(logits, targets, 0.7)
    assert torch.allclose(logprobs.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(entropies.double(), -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert torch.allclose(lse.double(), (logits.double() / 0.7).logsumexp(-1), rtol=1e-6)
    nothing = numbers(2, 50, grad=False)
    nothing[1, 4] = torch.nan
    assert softmax(nothing, torch.tensor([1, 2]), 1.0)[1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_block_of_logits(entropy: bool, dtype: torch.dtype) -> None:
    """Columns 40 to 340 of 500: the same as autograd."""
    logits, scale, slope = numbers(70, 500, scale=4), numbers(70, grad=False), numbers(70, grad=False) * entropy
    logits.data[3, 50] = 200.0  # every other logprob of the row is below -87
    targets = torch.arange(70) * 7
    logprobs = (logits / 0.7).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    expected = torch.autograd.grad(
        0.7 * (logprobs[torch.arange(70), targets] * scale + entropies * slope).sum(), logits
    )[0][:, 40:340]
    own = torch.where((targets >= 40) & (targets < 340), targets - 40, -1)
    part, lse = logits.detach()[:, 40:340], (logits / 0.7).logsumexp(-1).detach()

    given = (lse, scale, slope if entropy else None, entropies.detach(), dtype)
    got = softmax_backward(part.clone().contiguous(), own, 0.7, *given)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-5, "rtol": 2**-8}
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, **tolerance)


@needs_a_compiler
@pytest.mark.parametrize("size", [5, 128, 129, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_the_same_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch, size: int, temperature: float) -> None:
    logits = numbers(2000, size, scale=3, grad=False)
    logits[::3, size // 2] = -torch.inf
    keys = torch.arange(2000)
    uniform = counted_uniform(keys, keys)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniform, temperature)
    others, other_logprobs = in_torch(monkeypatch, lambda: draw_tokens(logits, uniform, temperature))
    # A threshold that falls between two tokens within rounding may go to either.
    assert int((tokens != others).sum()) <= 1
    same = tokens == others
    assert torch.allclose(logprobs[same], other_logprobs[same], atol=2e-6)
    assert bool((logits[keys, tokens] > -torch.inf).all())


@needs_a_compiler
def test_a_token_of_weight_0_is_not_drawn() -> None:
    """The sum in float32 is often above the sum in float64: the threshold is then beyond all tokens of the row."""
    logits = numbers(200, 1000, scale=3, grad=False)
    logits[:, -1] = -torch.inf
    tokens, logprobs = draw_tokens(logits, torch.full((200,), 1 - 2**-53, dtype=torch.float64), 1.0)
    assert int(tokens.max()) < 999 and bool(logprobs.isfinite().all())


def compiled_backbone(model: PreTrainedModel) -> KernelBackbone:
    return KernelBackbone(model, CompiledDecoder())


def fused_backbone(model: PreTrainedModel) -> KernelBackbone:
    return KernelBackbone(model, FusedDecoder())


def decoded(backbone: Backbone, rows: int, steps: int = 3) -> Tensor:
    """Return hidden states of a prefill of `rows` prompts and of a few steps, and the last logits."""
    ids = torch.arange(rows * 5).reshape(rows, 5) % 40
    cache = SlotCache(rows, 5 + steps, backbone.cache_dtype)
    with torch.no_grad():
        backbone.refresh()
        hidden = [backbone.prefill(ids, cache)[:, -1]]
        for row in range(rows):
            cache.admit(row, [(key[row], value[row]) for key, value in cache.prompt], 1)
        for step in range(steps):
            positions = torch.full((rows,), 5 + step)
            cache.aim(positions, 6 + step)
            hidden.append(backbone.step((ids[:, 0] + step) % 40, positions, cache))
        return torch.cat([*hidden, backbone.logits(hidden[-1])], dim=-1)


@needs_a_compiler
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13])
def test_a_compiled_step_is_that_of_the_modules(family: str, rows: int) -> None:
    model = tiny_model(family)
    assert use_grpo_attention(model)
    described = describe(model)
    assert described is not None and CompiledDecoder.is_supported(described, torch.float32)
    mine, fused, modules = (decoded(kind(model), rows) for kind in (compiled_backbone, fused_backbone, ModuleBackbone))
    assert torch.allclose(mine, modules, atol=1e-5, rtol=1e-5)
    assert torch.allclose(mine, fused, atol=1e-5, rtol=1e-5)


@needs_a_compiler
def test_a_compiled_step_of_long_rows_and_of_heads_that_are_no_multiple_of_32() -> None:
    model = tiny_model("llama", head_dim=40)
    assert use_grpo_attention(model)
    mine, modules = (decoded(kind(model), 3, steps=20) for kind in (compiled_backbone, ModuleBackbone))
    assert torch.allclose(mine, modules, atol=1e-5, rtol=1e-5)


@needs_a_compiler
def test_an_inside_that_fills_no_whole_panels() -> None:
    model = tiny_model("llama", intermediate_size=52)
    assert use_grpo_attention(model)
    assert torch.allclose(
        *(decoded(kind(model), 5) for kind in (compiled_backbone, ModuleBackbone)), atol=1e-5, rtol=1e-5
    )


@needs_a_compiler
def test_a_row_does_not_depend_on_those_beside_it_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert use_grpo_attention(model)
    together = decoded(compiled_backbone(model), 13)
    for rows in (1, 3, 8):
        assert torch.equal(decoded(compiled_backbone(model), rows), together[:rows])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(decoded(compiled_backbone(model), 13), together)


@needs_a_compiler
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_under_autocast_it_is_as_near_to_float32_as_the_modules(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    """With bfloat16 weights, keys and values; in float32 on a processor without products in bfloat16."""
    monkeypatch.setattr(grpo.kernels.cpu.decode_step, "has_bfloat16", lambda: has_bfloat16)
    model = tiny_model("qwen3", head_dim=40, spread=2.0)
    assert use_grpo_attention(model)
    exact = decoded(ModuleBackbone(model), 13, steps=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone = compiled_backbone(model)
        assert backbone.cache_dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
        mine, modules = (decoded(kind, 13, steps=20) for kind in (backbone, ModuleBackbone(model)))
        assert torch.equal(decoded(backbone, 3, steps=20), mine[:3])
    assert torch.equal(mine, decoded(backbone, 13, steps=20)) != has_bfloat16
    assert float((mine - exact).norm()) < 1.5 * float((modules - exact).norm())


@needs_a_compiler
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 8), (40, 24), (5, 7)])
def test_panels_hold_the_weight(outputs: int, inputs: int) -> None:
    weight, states = numbers(outputs, inputs, grad=False), numbers(9, inputs, grad=False)
    panels = Panels.of(weight)
    assert torch.equal(panels.tensor.transpose(1, 2).flatten(0, 1)[:outputs], weight)
    assert bool((panels.tensor.transpose(1, 2).flatten(0, 1)[outputs:] == 0).all())
    bias = numbers(outputs, grad=False)
    assert torch.allclose(CompiledDecoder().product(states, panels, bias), F.linear(states, weight, bias), atol=1e-5)


@needs_a_compiler
def test_the_engine_takes_it_and_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert use_grpo_attention(model)
    assert kind_of(choose_backbone(model)[0]) is CompiledDecoder
    # A result that is not the modules' is not used.
    with monkeypatch.context() as patch:
        patch.setattr(CompiledDecoder, "step", lambda self, *given: torch.ones(2, 32))
        assert kind_of(choose_backbone(model)[0]) is FusedDecoder
    for switch, kind in (
        ("auto,-decode_step", FusedDecoder),
        ("auto,-decode_step,-fused_decode", None),
        ("torch", None),
    ):
        monkeypatch.setenv("GRPO_KERNELS", switch)
        assert kind_of(choose_backbone(model)[0]) is kind
    monkeypatch.delenv("GRPO_KERNELS")
    monkeypatch.setattr(grpo.kernels.cpu.panels, "compiled", lambda source, **functions: None)
    assert kind_of(choose_backbone(model)[0]) is FusedDecoder


def kind_of(backbone: Backbone) -> type | None:
    return type(backbone.decoder) if isinstance(backbone, KernelBackbone) else None


def test_in_16_bits_it_is_the_fused_backbone(way: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    assert use_grpo_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone, _ = choose_backbone(model)
        assert decoded(backbone, 3).isfinite().all()
    assert kind_of(backbone) is FusedDecoder


@pytest.mark.parametrize("kind", [ModuleBackbone, fused_backbone])
def test_the_cache_has_the_dtype_that_was_budgeted(kind: Callable[[PreTrainedModel], Backbone]) -> None:
    backbone = kind(tiny_model())
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            cache = SlotCache(2, 6, backbone.cache_dtype)
            backbone.refresh()
            backbone.prefill(torch.tensor([[3, 4], [5, 6]]), cache)
            cache.admit(0, [(key[0], value[0]) for key, value in cache.prompt], 2)
            cache.aim(torch.tensor([2, 2]), 3)
            assert backbone.step(torch.tensor([7, 8]), torch.tensor([2, 2]), cache).isfinite().all()
        assert {tensor.dtype for tensor in (*cache.keys, *cache.values)} == {dtype}
        assert cache.bytes == cache.numbers * dtype.itemsize


@needs_a_compiler
def test_compiled_once_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    source = tmp_path / "twice.c"
    source.write_text("void twice(long count, float *x) { for (long i = 0; i < count; i++) x[i] *= 2; }\n")
    values = torch.arange(5.0)
    for _ in range(2):
        compiled.cache_clear()
        loaded = compiled(source, twice="lp")
        assert loaded is not None
        loaded.twice(5, values.data_ptr())
    assert values.tolist() == [0, 4, 8, 12, 16]
    (made,) = tmp_path.glob("twice-*.so")
    source.write_text("this is not C\n")
    compiled.cache_clear()
    assert compiled(source, twice="lp") is None
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".so"] == [made.name]
    compiled.cache_clear()


@needs_a_compiler
@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled again, in a folder of this user alone."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "shared"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("void one(float *x) { *x = 1; }\n")
    compiled.cache_clear()
    assert compiled(source, one="p") is not None
    (made,) = (tmp_path / "shared").glob("one-*.so")
    made.chmod(made.stat().st_mode | stat.S_IWOTH)
    compiled.cache_clear()
    loaded = compiled(source, one="p")
    assert loaded is not None and Path(loaded._name).parent == tmp_path / f"grpo-cache-{os.getuid()}"
    compiled.cache_clear()


@needs_a_compiler
def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a truncated library would end the process with SIGBUS."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("void one(float *x) { *x = 1; }\n")
    values = torch.zeros(1)
    for damage in (lambda whole: whole[: len(whole) // 3], lambda whole: b"", lambda whole: b"\0" * len(whole)):
        compiled.cache_clear()
        compiled(source, one="p")
        (made,) = tmp_path.glob("one-*.so")
        whole = made.read_bytes()
        damaged = tmp_path / "damaged"
        damaged.write_bytes(damage(whole))
        damaged.replace(made)  # the loaded file itself must not shrink
        compiled.cache_clear()
        loaded = compiled(source, one="p")
        assert loaded is not None
        loaded.one(values.data_ptr())
        assert made.read_bytes() == whole
    compiled.cache_clear()


@pytest.mark.parametrize("compiler", ["none", "false", "sh -c 'exit 3'"])
def test_no_compiler_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    compiled.cache_clear()
    assert library() is None
    assert grpo.kernels.cpu.panels.library() is None
    described = describe(tiny_model())
    assert described is not None and not CompiledDecoder.is_supported(described, torch.float32)
    compiled.cache_clear()
