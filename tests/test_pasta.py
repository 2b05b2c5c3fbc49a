"""PASTA equals literal reweighting, everywhere: each oracle here multiplies weights, not scores."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_attention import SERVED, state_of
from tiny_models import tiny, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from steerkit.attention.heads import Head
from steerkit.attention.hook import AttentionCall, Edit, attach, softmax_off_by_one
from steerkit.steering.key_bias import attend_biased
from steerkit.steering.pasta import emphasise
from steerkit.streaming.losses import token_losses
from steerkit.streaming.sink_cache import SinkCache

REFERENCE = Path(__file__).parent / "data" / "reference"
HEADS = [Head(0, 1), Head(0, 3), Head(1, 0), Head(1, 3)]
SPANS = [[(3, 9)], [(20, 24), (30, 31)]]
NEW = {"do_sample": False, "pad_token_id": 0, "output_logits": True}
NEW |= {"return_dict_in_generate": True, "max_new_tokens": 6}


def literal(heads: Iterable[tuple[int, int]], factor: Tensor) -> dict[int, Edit]:
    """Equation 2 as it stands: softmax, times `factor` (B,T) by key, renormalised; later keys 1.

    Keys must be the whole sequence. A sink, zero or learned, is one more key of full weight.
    """

    def of(layer: int) -> Edit:
        def edit(call: AttentionCall) -> Tensor:
            (B, H, Q, _), K = call.query.shape, call.key.shape[2]
            groups = H // call.key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
            scores = call.query @ key.mT * call.scaling
            visible = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
            visible = visible if call.mask is None else call.mask
            sink = torch.full((H,), -1e30) if call.sink is None else call.sink
            sink = sink.view(1, H, 1, 1).expand(B, H, Q, 1)
            weights = torch.cat([sink, scores.masked_fill(~visible, -1e30)], dim=-1).softmax(-1)
            held = torch.ones(B, K)
            T = min(K, factor.shape[1])
            held[:, :T] = factor.repeat_interleave(B // len(factor), 0)[:, :T]
            for which, head in heads:
                if which == layer:
                    weights[:, head, :, 1:] *= held[:, None]
            weights = weights / weights.sum(-1, keepdim=True)
            weights = weights[..., 1:] * visible  # rows of pads see nothing
            return (weights @ value).transpose(1, 2)

        return edit

    return {layer: of(layer) for layer in {layer for layer, _ in heads}}


def factor_of(spans: Sequence[Sequence[tuple[int, int]]], T: int, alpha: float) -> Tensor:
    out = torch.full((len(spans), T), alpha)
    for row, each in zip(out, spans, strict=True):
        for start, end in each:
            row[start:end] = 1.0
    return out


MASK = factor_of(SPANS, 40, 0.0).bool()
PADDED = torch.ones(2, 40, dtype=torch.long)  # as an attention mask
PADDED[1, :5] = 0


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def without_cache(
    model: PreTrainedModel,
    ids: Tensor,
    factor: Tensor,
    *,
    heads: Sequence[tuple[int, int]] = HEADS,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits (B,T,V) of one forward over whole sequences, literally reweighted."""
    inputs = {}
    if mask is not None:
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        mask = mask.repeat_interleave(len(ids) // len(mask), 0)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with attach(model, literal(heads, factor)):
        return model(ids, use_cache=False, **inputs).logits


def check_generated(
    model: PreTrainedModel, out: object, factor: Tensor, mask: Tensor | None = None
) -> None:
    """Every step's logits are those of the literal oracle on what had been generated before."""
    T = out.sequences.shape[1] - len(out.logits)
    whole = without_cache(model, out.sequences, factor, mask=mask)
    close(torch.stack(out.logits, 1), whole[:, T - 1 : -1])


# Equality


@pytest.mark.parametrize("name", [*SERVED, "opt"])
@torch.no_grad()
def test_prefill_and_decode_equal_literal_reweighting(name: str) -> None:
    model, ids = tiny(name), tokens(2, 40)
    before, factor = state_of(model), factor_of(SPANS, 40, 0.01)
    with emphasise(model, SPANS, HEADS):
        ours = model(ids).logits
        made = model.generate(ids, **NEW)
        made_padded = model.generate(ids, attention_mask=PADDED, **NEW)
    wanted = without_cache(model, ids, factor)
    close(ours, wanted)
    check_generated(model, made, factor)
    check_generated(model, made_padded, factor, PADDED)
    assert torch.equal(made.sequences[:, 40], wanted[:, -1].argmax(-1))  # greedy, and steered
    assert (model(ids).logits - wanted).abs().max() > 0.05
    assert state_of(model) == before


@pytest.fixture(scope="module")
def official() -> tuple[PreTrainedModel, dict[str, np.ndarray], list, dict]:
    model = AutoModelForCausalLM.from_pretrained(REFERENCE).eval()
    recorded = dict(np.load(REFERENCE / "pasta.npz"))
    spans = [[tuple(span)] for span in recorded["spans"].tolist()]
    return model, recorded, spans, json.loads(str(recorded["cases"]))


@pytest.mark.parametrize("case", ["few", "all", "mild"])
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_the_official_code_s(case: str, official: tuple) -> None:
    model, recorded, spans, cases = official
    heads, alpha = cases[case]
    ids = torch.from_numpy(recorded["ids"])
    with emphasise(model, spans, heads, alpha=alpha):
        logits = model(ids).logits[:, recorded["at"]]
        made = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    close(logits, torch.from_numpy(recorded[f"logits_{case}"]))
    assert torch.equal(made, torch.from_numpy(recorded[f"gen_{case}"]))


@torch.no_grad()
def test_left_padding_equals_the_official_code_s(official: tuple) -> None:
    model, recorded, spans, cases = official
    heads, alpha = cases["few"]
    ids, mask = (torch.from_numpy(recorded[key]) for key in ("ids_pad", "mask_pad"))
    with emphasise(model, spans, heads, alpha=alpha):
        new = NEW | {"max_new_tokens": 16, "eos_token_id": None}
        made = model.generate(ids, attention_mask=mask, **new)
    assert torch.equal(made.sequences, torch.from_numpy(recorded["gen_pad"]))
    close(made.logits[0], torch.from_numpy(recorded["scores_pad0"]))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "mistral"])
@torch.no_grad()
def test_alpha_1_is_bit_equal_to_plain(name: str) -> None:
    model, ids = tiny(name), tokens(2, 40)
    plain = model(ids).logits, model.generate(ids, attention_mask=PADDED, **NEW)
    with emphasise(model, SPANS, HEADS, alpha=1.0):
        assert torch.equal(model(ids).logits, plain[0])
        made = model.generate(ids, attention_mask=PADDED, **NEW)
    assert torch.equal(made.sequences, plain[1].sequences)
    assert torch.equal(torch.stack(made.logits), torch.stack(plain[1].logits))


# The kernel


@torch.no_grad()
def test_the_causal_kernel_and_grouped_queries_stay_and_decode_takes_one_row(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, stock = [], F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        mask = options["attn_mask"]
        widths = {x.shape[-1] for x in (query, key, value)}
        kept = options["is_causal"], options.get("enable_gqa"), key.shape[1]
        calls.append((widths, None if mask is None else tuple(mask.shape), *kept))
        return stock(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with emphasise(llama, SPANS[:1], [Head(1, 2)]):
        calls.clear()  # entering asked one token
        out = llama(tokens(1, 30))
        llama(tokens(1, 1), past_key_values=out.past_key_values)
    assert calls == [
        ({8}, None, True, True, 2),  # layer 0 has no steered head: the stock call
        ({9}, None, True, True, 2),
        ({8}, None, False, True, 2),
        ({8}, (1, 2, 2, 31), False, None, 2),  # (B, Hkv, heads of a group, K)
    ]


@torch.no_grad()
def test_half_precision_carries_log_alpha_through_prefill() -> None:
    # Keys outside score 13.75, keys inside 0: log(alpha) = -13.78125 balances them. Rounded to one
    # bfloat16 number, times the square root of D, it would be -13.75.
    K, D, inside = 20, 64, slice(4, 14)
    column = torch.full((1, K), -13.78125)
    column[:, inside] = 0.0
    key = torch.full((1, 1, K, D), 1.71875)
    key[:, :, inside] = 0.0
    value = torch.zeros(1, 1, K, D)
    value[:, :, inside] = 1.0
    query = torch.ones(1, 1, K, D)
    q, k, v = (x.bfloat16() for x in (query, key, value))
    share = attend_biased(
        AttentionCall(nn.Module(), q, k, v, None, 1 / 8, {}), torch.ones(1, 1), column
    )
    assert abs(share[0, -1, 0, 0].item() - 1 / (1 + math.exp(13.75 - 13.78125))) < 0.003


@torch.no_grad()
def test_head_sizes_for_accelerators_compute_the_same(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 40)
    monkeypatch.setattr("steerkit.attention.hook._ALIGN", {})  # as on any device but a CPU
    with emphasise(llama, SPANS, HEADS):
        close(llama(ids).logits, without_cache(tiny("llama"), ids, factor_of(SPANS, 40, 0.01)))


# Generation


@torch.no_grad()
def test_beams_equal_a_search_over_literal_forwards(llama: PreTrainedModel) -> None:
    ids, beams = tokens(2, 40), 3
    factor = factor_of(SPANS, 40, 0.01)
    with emphasise(llama, SPANS, HEADS):
        made = llama.generate(ids, num_beams=beams, num_return_sequences=2, **NEW)
    for row in range(2):
        held = [(0.0, ids[row])]
        for _ in range(NEW["max_new_tokens"]):
            batch = torch.stack([beam for _, beam in held])
            logits = without_cache(llama, batch, factor[row : row + 1])[:, -1].log_softmax(-1)
            total = torch.tensor([score for score, _ in held])[:, None] + logits
            best = total.flatten().topk(beams)
            held = [
                (score, torch.cat([batch[i // logits.shape[1]], i[None] % logits.shape[1]]))
                for score, i in zip(best.values.tolist(), best.indices, strict=True)
            ]
        for place in range(2):
            assert torch.equal(made.sequences[2 * row + place], held[place][1])


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_sliding_window_that_has_dropped_keys_steers_those_left(name: str) -> None:
    model, ids = tiny(name), tokens(2, 90)  # windows of 64
    spans, new = [[(3, 9), (60, 66)], [(70, 80)]], NEW | {"max_new_tokens": 12}
    with emphasise(model, spans, HEADS):
        made = model.generate(ids, **new)
    check_generated(model, made, factor_of(spans, 90, 0.01))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_chunks_equal_one_forward_and_a_second_prompt_starts_anew(name: str) -> None:
    model, ids, other = tiny(name), tokens(2, 90), tokens(2, 90, seed=1)
    factor = factor_of([[(3, 9)], [(70, 80)]], 90, 0.01)
    with emphasise(model, factor == 1, HEADS):
        for prompt in (ids, other):
            cache = DynamicCache(config=model.config)
            chunks = [model(x, past_key_values=cache).logits for x in prompt.split(37, 1)]
            close(torch.cat(chunks, 1), without_cache(tiny(name), prompt, factor))
            made = model.generate(prompt, prefill_chunk_size=20, **NEW)
            assert made.sequences.shape == (2, 96)


@torch.no_grad()
def test_a_mask_says_where_the_prompt_ends_and_the_answer_begins(llama: PreTrainedModel) -> None:
    ids, factor = tokens(1, 10).repeat(1, 4), factor_of([[(3, 9)]], 40, 0.01)
    new = NEW | {"eos_token_id": None, "max_new_tokens": 12}
    with emphasise(llama, factor == 1, HEADS):
        made = llama.generate(ids, **new)
        # Candidates, found at once in a prompt that repeats itself, come with the prompt.
        guessed = llama.generate(ids, prompt_lookup_num_tokens=3, **new)
        scored = llama(made.sequences).logits
    check_generated(llama, made, factor)
    assert torch.equal(made.sequences, guessed.sequences)
    close(scored, without_cache(llama, made.sequences, factor))


@torch.no_grad()
def test_without_a_cache_other_prompts_and_a_mask_s_replies_are_steered(
    llama: PreTrainedModel,
) -> None:
    ids, mask, factor = tokens(2, 40), MASK, factor_of(SPANS, 40, 0.01)
    prompts = [ids[:, :36], tokens(2, 40, seed=1), ids[:, :36]]  # no one begins with the one before
    with emphasise(llama, SPANS, HEADS):
        with pytest.raises(IndexError):
            llama(ids + 10_000)
        found = [llama(prompt, use_cache=False).logits for prompt in prompts]
    with emphasise(llama, mask, HEADS):
        made = llama.generate(ids, use_cache=False, **NEW)
    for prompt, logits in zip(prompts, found, strict=True):
        close(logits, without_cache(llama, prompt, factor[:, : prompt.shape[1]]))
    check_generated(llama, made, factor)


@pytest.mark.parametrize("spans", [[[(3, 9)]], "mask"])
def test_dense_losses_are_steered_the_same_whatever_the_block(
    llama: PreTrainedModel, spans: object
) -> None:
    ids, factor = tokens(1, 50), factor_of([[(3, 9)]], 49, 0.01)
    with emphasise(llama, factor == 1 if spans == "mask" else spans, HEADS):
        losses = [token_losses(llama, ids, block=block) for block in (64, 48, 10, 5, 1)]
    logits = without_cache(llama, ids[:, :-1], factor)
    wanted = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")[None]
    for found in losses:
        close(found, wanted)


@torch.no_grad()
def test_a_static_cache_and_keys_from_before_the_with(llama: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    static = StaticCache(llama.config, max_cache_len=64)
    with emphasise(llama, SPANS, HEADS):
        first = llama(ids, past_key_values=static).logits
        then = llama(ids[:, :1], past_key_values=static).logits
    whole = without_cache(llama, torch.cat([ids, ids[:, :1]], 1), factor_of(SPANS, 40, 0.01))
    close(torch.cat([first, then], 1), whole)

    kept = llama(ids[:, :25]).past_key_values  # read without steering
    with attach(llama, literal(HEADS, factor_of(SPANS, 40, 0.01))):
        wanted = llama(ids[:, 25:], past_key_values=deepcopy(kept)).logits
    with emphasise(llama, SPANS, HEADS):
        close(llama(ids[:, 25:], past_key_values=kept).logits, wanted)


@torch.no_grad()
def test_tokens_by_embedding_and_by_position_are_the_same(llama: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    with emphasise(llama, SPANS, HEADS):
        wanted = llama(ids).logits
        embedded = llama.get_input_embeddings()(ids)
        assert torch.equal(llama(inputs_embeds=embedded).logits, wanted)
        kept = DynamicCache()
        llama(ids, None, None, kept)  # a cache given by position
        last = llama(ids[:, :1], None, None, kept).logits
        assert torch.equal(llama(ids).logits, wanted)
    whole = without_cache(llama, torch.cat([ids, ids[:, :1]], 1), factor_of(SPANS, 40, 0.01))
    close(last, whole[:, -1:])


# Spans and alphas


@torch.no_grad()
def test_several_spans_are_their_union_and_a_mask_says_the_same(llama: PreTrainedModel) -> None:
    # The official library multiplies the spans themselves by alpha once there are two of them.
    ids = tokens(2, 40)
    with emphasise(llama, SPANS, HEADS):
        union = llama(ids).logits
    close(union, without_cache(llama, ids, factor_of(SPANS, 40, 0.01)))
    with emphasise(llama, MASK, HEADS):
        assert torch.equal(llama(ids).logits, union)
    with emphasise(llama, [[(3, 7), (5, 9), (3, 4)], [(30, 31), (20, 24), (20, 24)]], HEADS):
        assert torch.equal(llama(ids).logits, union)


@torch.no_grad()
def test_softmax_off_by_one_keeps_its_zero_sink_at_full_weight() -> None:
    model, ids, factor = tiny("llama", sharpen=2.0), tokens(2, 40), factor_of(SPANS, 40, 0.01)
    everywhere = [Head(layer, index) for layer in range(2) for index in range(4)]
    with softmax_off_by_one(model):
        with attach(model, literal(everywhere, factor)):
            wanted = model(ids).logits
        with emphasise(model, SPANS, everywhere):
            close(model(ids).logits, wanted)


# Errors, and the model afterwards


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("T", [10, 40])
@torch.no_grad()
def test_what_a_sink_cache_would_evict_is_not_steered(llama: PreTrainedModel, T: int) -> None:
    cache = SinkCache(llama, sinks=2, window=20)
    with pytest.raises(ValueError, match=r"evicts .* sinks=3"), emphasise(llama, [[(1, 3)]], HEADS):
        llama.generate(tokens(1, T), past_key_values=cache, **NEW)
    assert state_of(llama) == ("sdpa", [])
    assert llama(tokens(1, T), past_key_values=cache).logits.isfinite().all()  # as if never tried


def padded(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :22] = 0
    model(tokens(2, 40), attention_mask=mask)


def twice(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    model(tokens(2, 40), past_key_values=cache)
    model(tokens(2, 1), past_key_values=cache)
    model(tokens(2, 8), past_key_values=cache)
    cache.crop(-4)
    model(tokens(2, 1), past_key_values=cache)


def loop(model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    for _ in range(2):  # each forward makes a cache, and drops it
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)


def generate(**options: object) -> Callable[[PreTrainedModel], object]:
    return lambda model: model.generate(tokens(2, 40), **NEW, **options)


def forward(B: int, T: int, **inputs: object) -> Callable[[PreTrainedModel], object]:
    return lambda model: model(tokens(B, T), **inputs)


BOOL = torch.zeros(2, 40, dtype=torch.bool)
BOOL[:, 7] = True
PLAIN = forward(2, 40)


@pytest.mark.parametrize(
    ("spans", "heads", "options", "run", "message"),
    [
        ([[(1, 2)], []], HEADS, {}, PLAIN, "row 1 .* at least one"),
        ([(3, 9)], HEADS, {}, PLAIN, r"row 0 .*\[\[\(5, 12\)\]\]"),
        ([[(1, 2)], [(30, 41)]], HEADS, {}, PLAIN, "ends at token 41, past .* prompt of 40"),
        ([[(1, 2)]] * 3, HEADS, {}, PLAIN, "2 rows, spans for 3 prompts"),
        (SPANS, HEADS, {}, padded, r"rows \[1\]: a span covers padding"),
        (SPANS, HEADS, {}, twice, "1 tokens after 45 in the cache, 49 read so far"),
        (SPANS, HEADS, {}, loop, "41 tokens that begin with the 40 of the last prompt.* bool mask"),
        (SPANS, HEADS, {}, generate(use_cache=False), "without a cache.* bool mask"),
        (SPANS, HEADS, {}, generate(prefill_chunk_size=35), "5 tokens after 35 .* bool mask"),
        (SPANS, HEADS, {}, generate(guidance_scale=1.5), "leave out guidance_scale"),
        (BOOL, HEADS, {}, generate(guidance_scale=1.5), "leave out guidance_scale"),
        ([[(1.0, 2.0)]], HEADS, {}, PLAIN, "row 0 .*at least one"),
        (["ab"], HEADS, {}, PLAIN, "row 0 .*at least one"),
        ([[(5, 5)]], HEADS, {}, PLAIN, "row 0 .*at least one"),
        (SPANS, [], {}, PLAIN, "no heads: .* None for all heads"),
        (BOOL.long(), HEADS, {}, PLAIN, "int64 .*: expected a bool mask"),
        (BOOL & torch.tensor([[True], [False]]), HEADS, {}, PLAIN, r"rows \[1\] .* are empty"),
        (BOOL, HEADS, {}, forward(2, 39), "mask of 40 tokens, the prompt has 39"),
        (SPANS, {"1": [4]}, {}, PLAIN, "L1H4: .* query heads"),
        *(
            (SPANS, HEADS, {"alpha": alpha}, PLAIN, "alpha=.*: expected 0 < alpha <= 1")
            for alpha in (0.0, "0.01", None, float("nan"), torch.tensor([0.1, 0.2]))
        ),
        (BOOL, HEADS, {}, lambda m: m(tokens(2, 40) + 10_000), "index out of range"),
    ],
)
@torch.no_grad()
def test_bad_input_is_one_clear_error(
    llama: PreTrainedModel,
    spans: object,
    heads: object,
    options: dict[str, float],
    run: Callable[[PreTrainedModel], object],
    message: str,
) -> None:
    hooks, refused = hooks_of(llama), pytest.raises((ValueError, IndexError), match=message)
    with refused, emphasise(llama, spans, heads, **options):
        run(llama)
    assert (state_of(llama), hooks_of(llama)) == (("sdpa", []), hooks)
