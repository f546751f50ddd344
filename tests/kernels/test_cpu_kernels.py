"""What is written in C against the same in torch, number by number; and what happens where there is no compiler."""

import contextlib
import copy
import itertools
import os
import pickle
import stat
from pathlib import Path

import grpo.kernels.cpu.decoder_layer
import grpo.kernels.cpu.gemm
import pytest
import torch
import torch.nn.functional as F
from grpo.kernels.cpu.decoder_layer import use_lean_layers
from grpo.kernels.cpu.gemm import accumulate_grads_inplace, product
from grpo.rollout.compiled_backbone import CompiledBackbone, Panels, library
from grpo.rollout.kv_cache import SlotCache
from torch import Tensor

import grpo.kernels.cpu.attention
import grpo.kernels.cpu.compiler
import grpo.kernels.cpu.fused_ops
from grpo.config.schema import LoraConfig
from grpo.kernels.attention import GroupSpan, PackedLayout, grpo_attention
from grpo.kernels.cpu.compiler import compiled, kernels
from grpo.kernels.cpu.fused_ops import _RMSNorm, _SwiGLU
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.models.lora import add_adapter
from grpo.rollout.backbones import FusedBackbone, ModuleBackbone
from grpo.rollout.native_engine import choose_backbone
from grpo.rollout.sampling import counted_uniform, draw_tokens
from tests.fakes import tiny_model

needs_a_compiler = pytest.mark.skipif(kernels() is None, reason="there is no C compiler here")


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
        normed, gated = _RMSNorm.apply(hidden, weight, 1e-6), _SwiGLU.apply(gate, up)
        return [normed, gated, *torch.autograd.grad((normed * upstream + gated).sum(), [hidden, weight, gate, up])]

    monkeypatch.setattr(grpo.kernels.cpu.fused_ops, "threads_for", lambda count: threads)
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
    """Four groups in a row; the prompts of the second and the last lie elsewhere, and what was gathered for that of the third is added."""
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
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "terms", "columns"), [(1, 1, 1), (7, 5, 3), (100, 40, 33), (201, 900, 17), (13, 384, 1100), (600, 300, 80)]
)
def test_products_equal_torch_whichever_way_they_are_given(
    monkeypatch: pytest.MonkeyPatch, threads: int, rows: int, terms: int, columns: int
) -> None:
    monkeypatch.setattr(grpo.kernels.cpu.gemm, "threads_for", lambda count: threads)
    a, b, bias = (numbers(*shape, grad=False) for shape in ((rows, terms), (terms, columns), (columns,)))
    expected = (a.double() @ b.double() + bias.double()).float()
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    for a_across, b_across in itertools.product((False, True), repeat=2):
        given = (a.T.contiguous() if a_across else a, b.T.contiguous() if b_across else b)
        across = {"a_across": a_across, "b_across": b_across}
        made = product(*given, bias=bias, **across)
        assert torch.allclose(made, expected, **close)
        assert all(torch.equal(product(*given, bias=bias, **across), made) for _ in range(20))  # threads do not meet
        there = torch.full((rows, columns), 2.0)
        assert product(*given, into=there, **across) is there
        assert torch.allclose(there, expected - bias + 2, **close)


@needs_a_compiler
def test_gradients_are_added_where_they_belong_and_autograd_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a tied head and a padding token, twice: within `accumulate_grads_inplace` over two backward passes, and without."""
    monkeypatch.setattr(grpo.kernels.cpu.gemm, "FEWEST_ROWS", 1)
    plain = tiny_model("qwen2", tie_word_embeddings=True)
    plain.get_input_embeddings().padding_idx = 3
    use_lean_layers(plain)
    use_grpo_attention(plain)
    twin = copy.deepcopy(plain)
    batch = probe_batch(plain.config.vocab_size)
    for model, way in ((plain, contextlib.nullcontext), (twin, accumulate_grads_inplace)):
        logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=0.9)
        for factor in (1.0, -3.0):
            logprobs, _ = logprob_model(batch)
            with way():
                (logprobs * torch.arange(len(logprobs)) * factor).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert float((one.grad - other.grad).abs().max()) <= 1e-5 * float(one.grad.abs().max()), name


@needs_a_compiler
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_whole_layer_equals_its_modules(monkeypatch: pytest.MonkeyPatch, family: str, threads: int) -> None:
    """In C, in the modules' own way, and with a frozen weight: the same logprobs and gradients; the first without their calls."""
    monkeypatch.setattr(grpo.kernels.cpu.gemm, "FEWEST_ROWS", 1)
    monkeypatch.setattr(grpo.kernels.cpu.decoder_layer, "threads_for", lambda count: threads)
    called = []
    for name in ("attention_forward", "layer_forward", "layer_backward", "layer_backward_inputs"):
        function = getattr(kernels(), name)
        counted = lambda *given, name=name, function=function: (called.append(name), function(*given))  # noqa: E731
        monkeypatch.setattr(kernels(), name, counted)

    def everything(frozen: str = "none", checkpointed: bool = False) -> list[Tensor]:
        model = tiny_model(family, **({"sliding_window": 4} if family == "mistral" else {}))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # 1 and 0 would hide what is left out
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(frozen not in name)
        use_lean_layers(model)
        use_grpo_attention(model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        called.clear()
        logprobs, _ = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(
            probe_batch(model.config.vocab_size)
        )
        (logprobs * torch.arange(1, 1 + len(logprobs))).sum().backward()
        assert all((parameter.grad is None) == (frozen in name) for name, parameter in model.named_parameters())
        zero = torch.zeros(())
        return [logprobs.detach(), *(zero if p.grad is None else p.grad for p in model.parameters())]

    theirs = in_torch(monkeypatch, everything)
    mine = everything()
    assert called.count("layer_forward") == called.count("layer_backward") == called.count("layer_backward_inputs") == 2
    assert "attention_forward" not in called
    again = everything(checkpointed=True)
    assert called.count("layer_forward") == 4
    partly = everything(frozen="layers.1.self_attn.v_proj")
    for a, b, c, d in zip(mine, theirs, again, partly, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
        assert torch.equal(a, c)
        assert d.ndim == 0 or torch.equal(a, d)


@needs_a_compiler
def test_a_layer_in_which_something_was_replaced_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.kernels.cpu.gemm, "FEWEST_ROWS", 1)
    model = tiny_model("qwen2")
    use_lean_layers(model)
    use_grpo_attention(model)
    logprob_model, batch = (
        LogprobModel(model, uses_packed_attention=True, temperature=1.0),
        probe_batch(model.config.vocab_size),
    )
    before = logprob_model(batch)[0].detach()
    twin = copy.deepcopy(model)  # has weights of its own
    twin.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(logprob_model(batch)[0], before)
    changed = LogprobModel(twin, uses_packed_attention=True, temperature=1.0)(batch)[0].detach()
    assert not torch.allclose(changed, before)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(twin.model.layers[0].mlp.up_proj.weight.data.clone())
    assert torch.equal(logprob_model(batch)[0], changed)
    add_adapter(model, LoraConfig(r=4, target_modules=["up_proj"]), base="")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.fill_(0.1)
    assert not torch.allclose(logprob_model(batch)[0], changed)


@needs_a_compiler
@pytest.mark.parametrize("targets", [["q_proj"], ["gate_proj", "down_proj"]])
def test_products_beside_an_adapter_equal_torch(monkeypatch: pytest.MonkeyPatch, targets: list[str]) -> None:
    """A frozen base under LoRA: only the adapter gets gradients, the ones that torch's products give."""
    monkeypatch.setattr(grpo.kernels.cpu.gemm, "FEWEST_ROWS", 1)
    batch = probe_batch(tiny_model().config.vocab_size)

    def gradients() -> list[Tensor]:
        model = tiny_model()
        use_lean_layers(model)
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=4, target_modules=targets), base="")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data.normal_(std=0.1)
        with accumulate_grads_inplace():
            LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0].sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    mine, theirs = gradients(), in_torch(monkeypatch, gradients)
    assert len(mine) == len(theirs) == 2 * 2 * len(targets)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))


@needs_a_compiler
def test_the_softmax_of_extreme_logits() -> None:
    from grpo.logprobs import _softmax

    logits = torch.cat([numbers(5, 3001, scale=8, grad=False), torch.full((1, 3001), -90.0)])
    logits[0, 7], logits[5, 2] = 300.0, 20.0
    targets = torch.tensor([7, 0, 3000, 2999, 1, 5])
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    weights, total, lse, logprobs, entropies = _softmax(logits.clone(), targets, 0.7)
    assert torch.allclose(logprobs.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(entropies.double(), -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert torch.allclose(lse.double(), (logits.double() / 0.7).logsumexp(-1), rtol=1e-6)
    assert torch.allclose((weights / total[:, None]).double(), expected.exp(), atol=1e-6)
    nothing = numbers(2, 50, grad=False)
    nothing[1, 4] = torch.nan
    assert _softmax(nothing, torch.tensor([1, 2]), 1.0)[3].isnan().tolist() == [False, True]


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


def decoded(backbone, rows: int, steps: int = 3) -> Tensor:  # type: ignore[no-untyped-def]
    """Hidden states of a prefill of `rows` prompts, of a few steps, and the logits of the last."""
    ids = torch.arange(rows * 5).reshape(rows, 5) % 40
    cache = SlotCache(rows, 5 + steps)
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
    assert CompiledBackbone.fits(model)
    mine, fused, modules = (decoded(kind(model), rows) for kind in (CompiledBackbone, FusedBackbone, ModuleBackbone))
    assert torch.allclose(mine, modules, atol=1e-5, rtol=1e-5)
    assert torch.allclose(mine, fused, atol=1e-5, rtol=1e-5)


@needs_a_compiler
def test_a_compiled_step_of_long_rows_and_of_heads_that_are_no_multiple_of_32() -> None:
    model = tiny_model("llama", head_dim=40)
    assert use_grpo_attention(model)
    mine, modules = (decoded(kind(model), 3, steps=20) for kind in (CompiledBackbone, ModuleBackbone))
    assert torch.allclose(mine, modules, atol=1e-5, rtol=1e-5)


@needs_a_compiler
def test_a_layer_can_be_pickled() -> None:
    model = tiny_model("llama")
    use_lean_layers(model)
    again = pickle.loads(pickle.dumps(model.model.layers[0]))
    assert type(again) is type(model.model.layers[0])
    assert torch.equal(again.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@needs_a_compiler
def test_an_inside_that_fills_no_whole_panels() -> None:
    model = tiny_model("llama", intermediate_size=52)
    assert use_grpo_attention(model)
    assert torch.allclose(
        *(decoded(kind(model), 5) for kind in (CompiledBackbone, ModuleBackbone)), atol=1e-5, rtol=1e-5
    )


@needs_a_compiler
def test_a_row_does_not_depend_on_those_beside_it_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert use_grpo_attention(model)
    together = decoded(CompiledBackbone(model), 13)
    for rows in (1, 3, 8):
        assert torch.equal(decoded(CompiledBackbone(model), rows), together[:rows])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(decoded(CompiledBackbone(model), 13), together)


@needs_a_compiler
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 8), (40, 24), (5, 7)])
def test_panels_hold_the_weight(outputs: int, inputs: int) -> None:
    weight, states = numbers(outputs, inputs, grad=False), numbers(9, inputs, grad=False)
    panels = Panels.of(weight)
    assert torch.equal(panels.tensor.transpose(1, 2).flatten(0, 1)[:outputs], weight)
    assert bool((panels.tensor.transpose(1, 2).flatten(0, 1)[outputs:] == 0).all())
    backbone = CompiledBackbone.__new__(CompiledBackbone)
    bias = numbers(outputs, grad=False)
    assert torch.allclose(backbone.product(states, panels, bias), F.linear(states, weight, bias), atol=1e-5)


@needs_a_compiler
def test_the_engine_takes_it_and_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert use_grpo_attention(model)
    assert isinstance(choose_backbone(model)[0], CompiledBackbone)
    # A result that is not the modules' is not used.
    with monkeypatch.context() as patch:
        patch.setattr(CompiledBackbone, "step", lambda self, *given: FusedBackbone.step(self, *given) + 0.1)
        assert type(choose_backbone(model)[0]) is FusedBackbone
    monkeypatch.setattr(grpo.rollout.compiled_backbone, "compiled", lambda source, **functions: None)
    assert type(choose_backbone(model)[0]) is FusedBackbone


def test_in_16_bits_it_is_the_fused_backbone(way: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    assert use_grpo_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone, _ = choose_backbone(model)
        assert decoded(backbone, 3).isfinite().all()
    assert not getattr(backbone, "panels", False)


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
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("void one(float *x) { *x = 1; }\n")
    compiled.cache_clear()
    assert compiled(source, one="p") is not None
    (made,) = tmp_path.glob("one-*.so")
    made.chmod(made.stat().st_mode | stat.S_IWOTH)
    compiled.cache_clear()
    assert compiled(source, one="p") is None
    compiled.cache_clear()


@pytest.mark.parametrize("compiler", ["none", "false", "sh -c 'exit 3'"])
def test_no_compiler_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    compiled.cache_clear()
    assert library() is None
    assert kernels() is None
    assert not CompiledBackbone.fits(tiny_model())
    compiled.cache_clear()
