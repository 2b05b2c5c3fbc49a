"""Streaming equals one token per forward, under every option, for every architecture it accepts."""

import copy
import itertools
import math
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_streaming import Oracle
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, SIZE, V, tiny, tokens
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
)

from steerkit.attention.hook import softmax_off_by_one
from steerkit.attention.rope import Rotation, learn_rotations
from steerkit.chat import Message, prompt_ids, stop_ids
from steerkit.steering.other_methods import additive_bias, spotlight
from steerkit.steering.pasta import emphasise
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.losses import recomputed_losses, token_losses
from steerkit.streaming.sink_cache import SinkCache, visible
from steerkit.streaming.stream_eval import (
    EvalStream,
    Fact,
    Query,
    eval_hits,
    eval_stream,
    is_greedy,
)

REFERENCE = Path(__file__).parent / "data" / "reference"
ROTARY = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox", "olmo2", "smollm3"]
ROTARY += ["gpt_oss"]  # learned sinks


@pytest.fixture(scope="module")
def official() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    arrays = np.load(REFERENCE / "streaming.npz")
    model = LlamaForCausalLM.from_pretrained(REFERENCE).eval()
    model.generation_config.eos_token_id = None
    return model, {name: torch.tensor(arrays[name]) for name in arrays.files}


@torch.no_grad()
def stock_losses(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Tensor:
    logits = model(ids, **inputs).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, ids[:, 1:, None])[..., 0]


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# The reference


def test_the_cache_holds_what_the_last_token_saw() -> None:
    """The drawing in sink_cache: two sinks, a window of four, after the tokens 0 to 8."""
    assert visible(8, 2, 4) == [0, 1, 4, 5, 6, 7, 8]
    assert visible(0, 2, 4) == [0] and visible(3, 2, 4) == [0, 1, 2, 3]
    cache = SinkCache(tiny("llama"), sinks=2, window=4)
    assert cache.state.slots(4, 9) == (slice(4, 7), slice(2, 4))


# token_losses


@pytest.mark.parametrize("setting", ["4_60", "0_64", "1_31", "4_28", "dense"])
@pytest.mark.parametrize("block", [256, 37])
def test_losses_equal_the_official_code(official, setting: str, block: int) -> None:
    model, want = official
    sinks, window = (0, None) if setting == "dense" else map(int, setting.split("_"))
    ours = token_losses(model, want["ids"], sinks=sinks, window=window, block=block)
    assert gap(ours[0], want[f"nll_{setting}"]) < 1e-4


@pytest.mark.parametrize("change", ["window off by one", "no sinks", "one sink fewer", "no clamp"])
def test_the_official_numbers_can_tell_a_wrong_method(official, change: str) -> None:
    model, want = official
    ids = want["ids"]
    wrong = {
        "window off by one": lambda: token_losses(model, ids, sinks=4, window=61)[0],
        "no sinks": lambda: token_losses(model, ids, sinks=0, window=64)[0],
        "one sink fewer": lambda: token_losses(model, ids, sinks=3, window=61)[0],
        "no clamp": lambda: Oracle(model, 4, 60, clamp=False).losses(ids[:, :300])[0],
    }[change]()
    assert gap(wrong, want["nll_4_60"][: len(wrong)]) > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_oss"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 20), (0, 9), (7, 1)])
def test_losses_equal_one_token_at_a_time(name: str, sinks: int, window: int) -> None:
    model, ids = tiny(name), tokens(2, 220)
    want = Oracle(model, sinks, window).losses(ids)
    for block in (1, 5, 64, 256):  # smaller than the sinks, than the window, larger than both
        ours = token_losses(model, ids, sinks=sinks, window=window, block=block)
        assert gap(ours, want) < 2e-5, block


@pytest.mark.parametrize("name", ROTARY)
def test_blocks_change_nothing_and_a_wide_window_is_dense(name: str) -> None:
    model, ids = tiny(name), tokens(2, 150)
    one = token_losses(model, ids, sinks=3, window=30, block=1)
    assert gap(token_losses(model, ids, sinks=3, window=30, block=70), one) < 2e-4
    short = ids[:, :63]  # within the sliding windows
    wide = token_losses(model, short, sinks=2, window=60, block=20)
    assert gap(wide, stock_losses(model, short)) < 2e-5
    assert gap(token_losses(model, ids, block=40), stock_losses(model, ids)) < 2e-5


def test_more_queries_than_one_chunk_in_a_forward(llama: PreTrainedModel) -> None:
    ids = tokens(1, 700)
    want = token_losses(llama, ids, sinks=4, window=50, block=64)
    assert gap(token_losses(llama, ids, sinks=4, window=50, block=699), want) < 2e-5


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_static_rope_scaling_streams_exactly(kind: str) -> None:
    more = {"yarn": {"original_max_position_embeddings": 64}, "linear": {}}
    more["llama3"] = more["yarn"] | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | more[kind]
    model, ids = tiny("llama", rope_parameters=rope), tokens(1, 150)
    want = Scaled(model, 3, 20).losses(ids)
    assert gap(token_losses(model, ids, sinks=3, window=20), want) < 2e-5


class Scaled(Oracle):
    """yarn's factor on cos and sin is in the raw keys already (position 0), so it is taken out."""

    def __init__(self, model: PreTrainedModel, sinks: int, window: int) -> None:
        super().__init__(model, sinks, window)
        rotary, scale = self.rotary, self.rotary.attention_scaling
        self.rotary = lambda x, p: tuple(part / scale for part in rotary(x, p))


def test_positions_stay_exact_far_into_a_stream(llama: PreTrainedModel) -> None:
    """Two passes over the same text, far apart: once the first is evicted, losses repeat."""
    text = tokens(1, 400)
    ids = torch.cat([text[:, :4], *[text] * 50], dim=1)  # 20,000 tokens
    losses = token_losses(llama, ids, sinks=4, window=20)[0]
    second, last = losses[403 + 40 : 803], losses[-360:]
    assert gap(second, last) < 2e-5


def test_memory_does_not_grow(llama: PreTrainedModel) -> None:
    cache, sizes = SinkCache(llama, sinks=4, window=20), []
    with torch.no_grad():
        for piece in tokens(1, 900).split(100, dim=1):
            llama(piece, past_key_values=cache)
            sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * 4 * 2 * 8 * (25 + 25 + 4)  # layers, bytes, heads, D, slots


def test_a_zero_sink_model_streams(llama: PreTrainedModel) -> None:
    ids = tokens(2, 120)
    plain = token_losses(llama, ids, sinks=2, window=20)
    with softmax_off_by_one(llama):
        one = token_losses(llama, ids, sinks=2, window=20, block=1)
        assert gap(token_losses(llama, ids, sinks=2, window=20), one) < 2e-5
        wide = token_losses(llama, ids, sinks=2, window=200, block=50)
        assert gap(wide, stock_losses(llama, ids)) < 2e-5
    assert gap(one, plain) > 0.05


def test_hits_are_the_greedy_tokens(llama: PreTrainedModel) -> None:
    ids = tokens(1, 30)
    new = llama.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert token_losses(llama, new, score=is_greedy)[0, 29:].all()
    assert not token_losses(llama, new + (new < V - 1), score=is_greedy)[0, 29:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "pairs"), [("glm", [True, True]), ("smollm3", [False, None])])
def test_one_large_dimension_does_not_hide_how_keys_rotate(
    name: str, pairs: list[bool | None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "glm", SIZE | {"partial_rotary_factor": 0.5})
    model = tiny(name, attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[5::8] = 200
    rotations = learn_rotations(model.to(dtype))[1]
    assert [rotation and rotation.interleaved for rotation in rotations] == pairs


def test_interleaved_pairs_rotate_as_complex_numbers() -> None:
    x, steps = torch.randn(5, 12, dtype=torch.float64).float(), torch.arange(5)
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64), True)
    pairs = torch.view_as_complex(x[:, :6].reshape(5, 3, 2))
    angles = steps[:, None] * rotation.frequencies
    want = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)
    ours = rotation.rotate(x, rotation.table(steps))
    torch.testing.assert_close(ours, torch.cat([want.float(), x[:, 6:]], 1))


# recomputed_losses


def test_recomputation_equals_a_forward_per_token(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.streaming.losses._BATCH_TOKENS", 100)
    ids, L = tokens(2, 40), 12
    want = [stock_losses(llama, ids[:, max(0, p + 1 - L) : p + 2])[:, -1] for p in range(39)]
    ours = recomputed_losses(llama, ids, length=L)
    assert gap(ours, torch.stack(want, 1)) < 2e-5
    at = [38, 3, 11, 12, 3]
    assert gap(recomputed_losses(llama, ids, length=L, positions=at), ours[:, at]) < 2e-5
    assert gap(ours, token_losses(llama, ids, sinks=0, window=L - 1)) > 0.05
    assert gap(recomputed_losses(llama, ids, length=50), stock_losses(llama, ids)) < 2e-5


def test_recomputation_puts_the_first_tokens_before_each_window(llama: PreTrainedModel) -> None:
    ids, front = tokens(1, 30), torch.tensor([[5, 9]])
    windows = [torch.cat([front, ids[:, p - 7 : p + 2]], 1) for p in range(7, 29)]
    want = torch.stack([stock_losses(llama, window)[:, -1] for window in windows], 1)
    ours = recomputed_losses(llama, ids, length=8, first=[5, 9], positions=range(7, 29))
    assert gap(ours, want) < 2e-5


# SinkCache under generate


GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("prompt", [100, 20])  # longer and shorter than the cache
def test_generate_equals_the_oracle_over_2000_tokens(official, prompt: int) -> None:
    model = official[0]
    ids, new = tokens(1, prompt), 2000 if prompt == 100 else 200
    cache = SinkCache(model, sinks=4, window=28)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, **GREEDY)
    assert out[0, prompt:].tolist() == Oracle(model, 4, 28).greedy(ids, new)
    assert cache.get_seq_length() == prompt + new - 1
    assert len(set(out[0, -200:].tolist())) > 100  # not a loop, which would prove little


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "smollm3"])
def test_conversation_goes_on_over_many_turns(name: str) -> None:
    model, ids = tiny(name), tokens(1, 40)
    cache = SinkCache(model, sinks=4, window=20)
    for turn in range(4):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=15, **GREEDY)
        ids = torch.cat([ids, tokens(1, 1 + 11 * turn, seed=turn)], dim=1)
    with torch.no_grad():
        model(ids[:, cache.seen : -1], past_key_values=cache)
        logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1]  # a single query last
    want = token_losses(model, torch.cat([ids, ids[:, :1]], 1), sinks=4, window=20, block=1)
    assert -logits.log_softmax(-1)[0, ids[0, 0]].item() == pytest.approx(
        want[0, -1].item(), abs=1e-4
    )


@pytest.mark.parametrize("block", [1, 70])
def test_a_sliding_window_that_just_holds_the_cache_changes_nothing(block: int) -> None:
    local, free = tiny("mistral", sliding_window=25), tiny("mistral", sliding_window=None)
    ours, want = (
        token_losses(m, tokens(1, 120), sinks=4, window=20, block=block) for m in (local, free)
    )
    assert gap(ours, want) < 2e-5


def test_batches_of_equal_length_and_chunked_prefill(llama: PreTrainedModel) -> None:
    ids, new = tokens(3, 70), {"max_new_tokens": 40, **GREEDY}
    out = llama.generate(ids, past_key_values=SinkCache(llama, window=20), **new)
    for row in range(3):
        assert out[row, 70:].tolist() == Oracle(llama, 4, 20).greedy(ids[row : row + 1], 40)
    cache = SinkCache(llama, window=20)
    chunked = llama.generate(ids, past_key_values=cache, prefill_chunk_size=16, **new)
    assert torch.equal(chunked, out)


def test_the_model_s_own_attention_serves_single_tokens() -> None:
    model, ids = tiny("llama"), tokens(1, 50)
    model.set_attn_implementation("eager")
    cache = SinkCache(model, window=20)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY)
    assert out[0, 50:].tolist() == Oracle(model, 4, 20).greedy(ids, 30)
    assert model.config._attn_implementation == "eager"


def test_beam_search_reorders_the_streams(llama: PreTrainedModel) -> None:
    ids, new = tokens(2, 3), {"max_new_tokens": 20, "num_beams": 3, **GREEDY}
    plain = llama.generate(ids, past_key_values=DynamicCache(), **new)
    cache = SinkCache(llama, sinks=12)  # longer than the prompt: each beam has its own sinks
    assert torch.equal(llama.generate(ids, past_key_values=cache, **new), plain)


def test_the_cache_leaves_no_hook_behind() -> None:
    llama = tiny("llama")
    cache = SinkCache(llama)
    assert len(llama._forward_pre_hooks) == 1
    del cache
    assert not llama._forward_pre_hooks and not llama._forward_hooks


def test_an_unmerged_adapter_streams_as_the_merged_model_does() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, ids = get_peft_model(tiny("llama"), config).eval(), tokens(1, 50)
    new = {"max_new_tokens": 20, **GREEDY}
    out = model.generate(input_ids=ids, past_key_values=SinkCache(model, window=20), **new)
    losses = token_losses(model, ids, sinks=4, window=20)
    merged = model.merge_and_unload()
    assert out[0, 50:].tolist() == Oracle(merged, 4, 20).greedy(ids, 20)
    assert gap(losses, token_losses(merged, ids, sinks=4, window=20)) < 2e-5


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_alone_with_the_same_model(llama: PreTrainedModel, copied: Callable) -> None:
    ids, other = tokens(1, 81), tokens(1, 41, seed=1)
    whole = token_losses(llama, ids, sinks=2, window=20)
    cache = SinkCache(llama, sinks=2, window=20)
    token_losses(llama, ids[:, :41], cache=cache)
    prefix = copied(cache)
    token_losses(llama, other, cache=cache)
    assert prefix.seen == 40 and prefix._model is llama
    assert gap(token_losses(llama, ids[:, 40:], cache=prefix), whole[:, 40:]) < 2e-5
    with pytest.raises(ValueError, match=r"token ids.*new SinkCache"):
        pickle.dumps(cache)


@pytest.mark.parametrize("T", [12, 40])  # shorter than the first stream, and as long
def test_a_second_stream_is_told_to_reset(llama: PreTrainedModel, T: int) -> None:
    cache, new = SinkCache(llama, window=20), {"max_new_tokens": 1, **GREEDY}
    llama.generate(tokens(1, 40), past_key_values=cache, **new)
    ask = partial(llama.generate, tokens(1, T, seed=1), past_key_values=cache, **new)
    with pytest.raises(ValueError, match=r"another stream.*reset\(\)"):
        ask()
    cache.reset()
    ask()
    assert cache.seen == T


def test_an_interrupted_forward_is_not_continued_silently(llama: PreTrainedModel) -> None:
    cache = SinkCache(llama, window=8)
    layer = llama.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="stop"):
            llama(tokens(1, 40), past_key_values=cache)
        handle.remove()
        assert llama.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="did not finish"):
            llama(tokens(1, 1), past_key_values=cache)
        cache.reset()
        again = llama(tokens(2, 30), past_key_values=cache).logits
        fresh = llama(tokens(2, 30), past_key_values=SinkCache(llama, window=8)).logits
    assert torch.equal(again, fresh)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m, ids, new: m(ids, attention_mask=ids * 0, **new), "padding"),
        (lambda m, ids, new: m(ids, position_ids=torch.arange(3, 8)[None], **new), "position_ids"),
        (
            lambda m, ids, new: tiny("llama", seed=1)(ids, **new),
            "the model this SinkCache was made",
        ),
        (torch.enable_grad()(lambda m, ids, new: m(ids, **new)), "no_grad"),
        (
            lambda m, ids, new: m.generate(
                ids.repeat(1, 9), prompt_lookup_num_tokens=3, max_new_tokens=30, **new, **GREEDY
            ),
            "cannot take tokens back",
        ),
    ],
)
@torch.no_grad()
def test_what_would_be_silently_wrong_is_an_error(
    llama: PreTrainedModel, misuse: Callable[..., object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        misuse(llama, tokens(1, 5), {"past_key_values": SinkCache(llama, sinks=2, window=10)})
    assert llama.config._attn_implementation == "sdpa"


def test_inside_emphasise_all_tokens_are_the_prompt_and_nothing_streams(
    llama: PreTrainedModel,
) -> None:
    ids = tokens(1, 60)
    with emphasise(llama, [[(3, 9)]], None, alpha=0.1):
        whole = token_losses(llama, ids, block=60)
        assert gap(token_losses(llama, ids, block=16), whole) < 2e-5
        with pytest.raises(ValueError, match="SinkCache"):
            token_losses(llama, ids, window=20)
    assert gap(token_losses(llama, ids), whole) > 0.05


@pytest.mark.parametrize("size", [{"sinks": True}, {"window": True}, {"window": 8.0}])
def test_sizes_are_whole_numbers(llama: PreTrainedModel, size: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected a whole number, "):
        SinkCache(llama, **size)


def test_ids_may_have_any_integer_type(llama: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    for losses in (token_losses, partial(recomputed_losses, length=9)):
        assert torch.equal(losses(llama, ids.int()), losses(llama, ids))


def test_a_model_that_sees_its_targets_is_refused() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=V, intermediate_size=48, **size)).eval()
    for losses in (token_losses, partial(recomputed_losses, length=9)):
        with pytest.raises(ValueError, match="bidirectional"):
            losses(model, tokens(1, 40))


# Steering inside the sinks

SPAN, PROMPT = (2, 6), 14  # of the first 8 tokens, which are sinks; the rest is evicted in time


def pasta_factor(weights: Tensor, kept: Tensor) -> Tensor:
    outside = (kept < PROMPT) & ~((kept >= SPAN[0]) & (kept < SPAN[1]))
    return torch.where(outside, 0.1, 1.0)


def boost_factor(weights: Tensor, kept: Tensor) -> Tensor:
    return torch.where((kept >= SPAN[0]) & (kept < SPAN[1]), math.exp(2), 1.0)


def spotlight_factor(weights: Tensor, kept: Tensor) -> Tensor:
    inside = (kept >= SPAN[0]) & (kept < SPAN[1])
    psi = (weights * inside).sum(-1, keepdim=True)
    raised = torch.where((psi > 0) & (psi < 1), (0.6 / psi).clamp(min=1), 1.0)
    return torch.where(inside, raised, 1.0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_oss"])
@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (partial(emphasise, heads=None, alpha=0.1), pasta_factor),
        (partial(additive_bias, bias=2.0), boost_factor),
        (partial(spotlight, target=0.6), spotlight_factor),
    ],
    ids=["pasta", "boost", "spotlight"],
)
@pytest.mark.parametrize(("block", "window"), [(1, 12), (40, 12), (40, 4)])
@torch.no_grad()
def test_spans_inside_the_sinks_are_steered_for_ever(
    name: str, method: Callable, factor: Callable, block: int, window: int
) -> None:
    """As one token at a time with literal reweighting: decoding, and blocks that evict."""
    model, ids = tiny(name), tokens(1, 60)
    wanted, plain = (
        torch.stack([oracle.step(ids[:, t]) for t in range(60)], 1)
        for oracle in (Oracle(model, 8, window, factor=factor), Oracle(model, 8, window))
    )
    cache = SinkCache(model, sinks=8, window=window)
    with method(model, [[SPAN]]):
        prompt, first, rest = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1], ids[:, PROMPT + 1 :]
        pieces = (prompt, first, *rest.split(block, dim=1))
        logits = [model(piece, past_key_values=cache).logits for piece in pieces]
    assert gap(torch.cat(logits, 1), wanted) < 2e-5 and gap(plain, wanted) > 1e-3


# What cannot stream

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
MLA = SIZE | {"head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16}
MLA |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {}, "learned positions"),
        ("deepseek_v2", {}, r"last 8 dimensions of each key are rotary \(MLA\)"),
        ("deepseek_v3", {}, r"last 8 dimensions of each key are rotary \(MLA\)"),
        ("mistral", {"sliding_window": 30}, "sliding_window.*sinks . window <= 29"),
        ("gemma3", {"sliding_window": 30}, "layer 0 sees only the last 30"),
        ("llama", {"rope_parameters": DYNAMIC}, "'dynamic' changes its frequencies"),
        ("llama", {"rope_parameters": LONGROPE}, "'longrope' changes its frequencies"),
    ],
)
def test_unstreamable_models_are_refused(
    name: str, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, name, CONFIGS.get(name, MLA))
    with pytest.raises(ValueError, match=message):
        token_losses(tiny(name, **changes), tokens(1, 40), sinks=4, window=40)


def test_dense_ends_where_positions_end() -> None:
    model = tiny("gpt2")
    assert gap(token_losses(model, tokens(1, 128)), stock_losses(model, tokens(1, 128))) < 2e-5
    for refused in (model, tiny("llama", max_position_embeddings=128, rope_parameters=DYNAMIC)):
        with pytest.raises(ValueError, match="at 128"):
            token_losses(refused, tokens(1, 130))


# stream_chat and StreamEval


def test_a_pinned_first_message_is_all_sinks(tiny) -> None:
    """Equal to counting its tokens by hand; without the pin the replies are others."""
    asked = ["Hobby: chess. Where does Anna Adler live?", *["Which pet does Otto Evans have?"] * 5]
    opening = [Message("system", "Be brief."), Message("user", asked[0])]
    sinks = len(prompt_ids(tiny[1], opening))

    def chat(**options: object) -> list[str]:
        return [r.text for r in stream_chat(*tiny, asked, system="Be brief.", window=24, **options)]

    assert chat(pin=True) == chat(sinks=sinks) != chat()


@pytest.mark.parametrize("longest", [3, 30])  # replies are cut short, or end by themselves
def test_a_chat_is_one_stream_in_the_template_s_format(tiny, longest: int) -> None:
    """Replies equal the oracle's over the whole rendered dialogue."""
    (model, tokenizer), messages = tiny, [Message("system", "Be brief.")]
    asked = ["Where does Anna Adler live?", "Which pet does she have?", "And Otto Evans?"]
    endless = itertools.chain(asked, itertools.repeat("never read"))
    options = {"system": "Be brief.", "window": 30, "max_new_tokens": longest}
    chat = stream_chat(model, tokenizer, endless, **options)
    for question, reply in zip(asked, chat, strict=False):
        messages.append(Message("user", question))
        ids = torch.tensor([prompt_ids(tokenizer, messages)])
        expected = Oracle(model, 4, 30).greedy(ids, longest)
        ended = set(expected) & set(stop_ids(model, tokenizer))
        assert bool(ended) == (longest == 30)
        if ended:
            expected = expected[: expected.index(ended.pop())]
        assert reply.ids == expected
        assert reply.seen == ids.shape[1] + len(reply.ids) - (longest == 3)
        assert reply.kept == min(reply.seen, 35)
        messages.append(Message("assistant", reply.text))
    assert reply.seen > 40


def register(number: int, rng: random.Random) -> Fact:
    value = f"{rng.randrange(10**5):05d}"
    line = f"line {number}: the content of register {number} is <{value}>.\n"
    return Fact(line, f"Tell me the content of register {number}: <", value, ">\n")


def test_eval_stream_asks_for_lines_that_are_there(tiny) -> None:
    tokenizer = tiny[1]
    make = {"fact": register, "lines": 60, "every": 5, "back": [2, 9, 30], "seed": 3}
    stream, asked = eval_stream(tokenizer, **make), []
    text = tokenizer.decode
    ids = stream.ids[0]
    assert text(ids[1:]).startswith("line 0: ") and text(ids).count("line ") == 60
    for query in stream.queries:
        before, answer = text(ids[: query.start]), text(ids[query.start : query.stop])
        number = int(before.rsplit("register ", 1)[1].removesuffix(": <"))
        read = text(ids[: query.start - query.distance])
        assert read.endswith(f"register {number} is <{answer}>.\n") and query.distance > 0
        assert before.count("line ") == number + query.back + 1
        asked.append(number)
    assert len(set(asked)) == len(asked) == 12  # none is asked twice
    assert {query.back for query in stream.queries} == {2, 9, 30}


def test_hits_need_every_token_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = torch.ones(1, 19, dtype=torch.bool)
    hits[0, 9] = False  # token 10 is not what the model would say
    losses = "steerkit.streaming.stream_eval.token_losses"
    monkeypatch.setattr(losses, lambda *_, **__: hits.float())
    queries = [Query(8, 10, 1, 3), Query(9, 11, 2, 4), Query(11, 13, 2, 6), Query(10, 12, 2, 9)]
    stream = EvalStream(torch.zeros(1, 20, dtype=torch.long), queries)
    hits = eval_hits(None, stream, sinks=4, window=8)
    assert hits.tolist() == [True, False, True, False]
