"""The head search: equal to the naive loop, resumable, shared out, and what is chosen from it."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, GraniteConfig

from steerkit.attention.heads import Head
from steerkit.attention.hook import softmax_off_by_one
from steerkit.steering import head_search
from steerkit.steering.head_search import (
    HeadTable,
    answer_scores_with_heads,
    bias_slopes,
    intersection,
    load_table,
    naive_scores,
    random_heads,
    score_heads,
    score_heads_by,
    screen_heads,
    screening_regret,
    select_heads,
    shared_top_k,
    stability,
)
from steerkit.steering.pasta import emphasise
from steerkit.steering.scoring import Prompt, PromptBatch, padded
from steerkit.steering.tasks import to_prompts
from steerkit.tiny.tasks import TASKS

SIZE = (2, 4)


def some_prompts(n: int = 5, *, first: int = 3) -> list[Prompt]:
    """Prompts of several lengths, one with two spans that overlap."""
    found = []
    for i in range(n):
        ids = tiny_models.tokens(1, 17 + 2 * i, seed=i)[0].tolist()
        spans = [(first + i, first + 4 + i)] + ([(first + 2, first + 9)] if i == 1 else [])
        found.append(Prompt(ids[: 13 + i], spans, ids[13 + i :]))
    return found


@pytest.fixture(scope="module")
def llama():
    return tiny_models.tiny("llama")


@pytest.fixture(scope="module")
def table(llama) -> HeadTable:
    return score_heads(llama, some_prompts())


def of(values, baseline=0.0) -> HeadTable:
    """A table of the given scores (N,L,H)."""
    scores = torch.tensor(values, dtype=torch.float32)
    return HeadTable(scores, torch.full((len(scores),), baseline), {"model": "by hand"})


# --- the same scores ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "tokens"), [(0, None), (3, None), (3, 64)], ids=["span at the start", "inside", "few"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_the_search_returns_the_naive_loops_scores(name, first, tokens):
    check_equal_to_naive(tiny_models.tiny(name), some_prompts(first=first), tokens)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_sinks_that_keep_their_weight_are_searched_exactly(name):
    """Also tokens before the span change: the keys they see lose weight to the sink."""
    model = tiny_models.tiny(name)
    with softmax_off_by_one(model) if name == "llama" else nullcontext():
        check_equal_to_naive(model, some_prompts(first=3))


def check_equal_to_naive(model, prompts, tokens=None, atol=1e-5):
    fast, slow = score_heads(model, prompts, tokens=tokens), naive_scores(model, prompts)
    torch.testing.assert_close(fast.scores, slow.scores, atol=atol, rtol=0)
    torch.testing.assert_close(fast.baseline, slow.baseline, atol=atol, rtol=0)
    assert (slow.scores - slow.baseline[:, None, None]).abs().max() > 1e-2
    assert fast.about == slow.about


def granite():
    """Its logits are scaled after the LM head."""
    return GraniteConfig(**tiny_models.SIZE, logits_scaling=0.1)


def gemma4():
    """Its upper layers read the keys and values of lower ones."""
    size = tiny_models.SIZE | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    ple = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny_models.V}
    return Gemma4TextConfig(**size, **ple, global_head_dim=8, num_kv_shared_layers=2)


@pytest.mark.parametrize("config", [granite, gemma4])
@pytest.mark.parametrize("first", [0, 3])
def test_scaled_logits_and_shared_keys_get_the_naive_loops_scores(config, first):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    check_equal_to_naive(model, some_prompts(2, first=first), tokens=1)


def test_an_exchange_that_raises_no_error_is_noticed():
    """Layer 1 adds what layer 0 computed last: for another head, once layer 0 is left out."""
    model, exchanged = tiny_models.tiny("llama"), []
    lower, upper = (layer.mlp for layer in model.model.layers)
    lower.register_forward_hook(lambda _, args, out: exchanged.append(out[:, 8:9]))
    upper.register_forward_hook(lambda _, args, out: out + exchanged[-1])
    check_equal_to_naive(model, some_prompts(2, first=0), tokens=1)


def test_what_steering_a_head_cannot_change_is_computed_once(monkeypatch):
    """Layer 0 runs for the prefix, the baseline and its own heads; not for those of layer 1."""
    model, tokens = tiny_models.tiny("llama"), []
    watched = model.model.layers[0].mlp  # a layer that returns what is known never gets there
    watched.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    (prompt,) = some_prompts(1)
    batch = PromptBatch(model, [prompt], 0.01)
    rest = len(prompt.ids) + len(prompt.answer) - prompt.first - 1  # the last is nobody's context
    assert tokens == [1, prompt.first, rest]  # 1: trace_attention
    batch.scores([Head(1, 0), Head(1, 2)], 1024)
    assert len(tokens) == 3
    batch.scores([Head(0, 0), Head(1, 2)], 1024)
    assert tokens[3:] == [2 * rest]


def test_a_score_is_the_mean_log_probability_of_the_answers_tokens(llama):
    (p,) = some_prompts(1)
    ids = torch.tensor([p.ids + p.answer])
    inside = torch.zeros(ids.shape, dtype=torch.bool)
    inside[0, p.spans[0][0] : p.spans[0][1]] = True
    inside[0, len(p.ids) :] = True  # the answer's own tokens keep their weight
    with torch.no_grad(), emphasise(llama, inside, [(1, 2)]):
        log_p = llama(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(len(p.ids), ids.shape[1])
    expected = sum(log_p[t - 1, ids[0, t]].item() for t in places) / len(p.answer)
    assert answer_scores_with_heads(llama, [p], [(1, 2)]).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_half_precision_is_searched_too():
    model = tiny_models.tiny("llama", sharpen=1.0).bfloat16()
    check_equal_to_naive(model, some_prompts(3), atol=0.05)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_that_ends_before_a_span_is_searched_exactly(name):
    model = tiny_models.tiny(name, sliding_window=8)
    ids = tiny_models.tokens(2, 44).tolist()
    prompts = [Prompt(ids[0][:40], [(1, 4)], ids[0][40:]), Prompt(ids[1][:40], [(30, 33)], [7, 8])]
    check_equal_to_naive(model, prompts, tokens=1)


def test_a_layer_that_fails_leaves_the_model_as_it_was(monkeypatch):
    """accelerate puts a `forward` of its own on modules: it must come back after a search."""
    model = tiny_models.tiny("llama")
    first, last = model.model.layers
    own = first.forward = partial(type(first).forward, first)
    batch = PromptBatch(model, some_prompts(2), 0.01)
    monkeypatch.setattr(last.mlp, "forward", None)
    with pytest.raises(TypeError):
        batch.scores([Head(1, 0)], 1024)
    assert first.forward is own
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_metrics_make_tables_too(llama):
    ids, inside, _ = padded(some_prompts(3))

    @torch.no_grad()
    def measure(steer):
        with steer(llama, inside) if steer else nullcontext():
            return llama(ids, use_cache=False).logits[:, -1, 0]

    found = score_heads_by(llama, measure, heads=[(1, 0), (0, 3)])
    assert set(found.ranked()) == {(1, 0), (0, 3)}
    direct = measure(partial(emphasise, heads=[(1, 0)], alpha=0.01))
    torch.testing.assert_close(found.scores[:, 1, 0], direct)


# --- on disk -----------------------------------------------------------------------------------


def test_a_search_that_was_stopped_goes_on_where_it_ended(llama, table, tmp_path, monkeypatch):
    path, whole, batches = tmp_path / "t.json", PromptBatch.scores, []

    def stopped(*given):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(given)
        return whole(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PromptBatch, "scores", stopped)
        score_heads(llama, some_prompts(), tokens=1, path=path)
    assert load_table(path).scores[:, 0, 0].isfinite().sum() == 2
    found = score_heads(llama, some_prompts(), path=path)
    torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.baseline, table.baseline, atol=1e-5, rtol=0)
    monkeypatch.setattr(head_search, "PromptBatch", None)  # the whole table is there
    again = score_heads(llama, some_prompts(), path=path)
    assert torch.equal(again.scores, found.scores) and torch.equal(again.baseline, found.baseline)


@pytest.mark.parametrize(("n", "changes"), [(5, {"alpha": 0.1}), (5, {"task": "a"}), (4, {})])
def test_a_table_of_something_else_is_refused(llama, table, tmp_path, n, changes):
    table.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"a table of .*'alpha': 0.01.*, not of "):
        score_heads(llama, some_prompts(n), path=tmp_path / "t.json", **changes)


def test_shares_of_the_prompts_joined_are_the_whole_table(llama, table):
    parts = [score_heads(llama, share) for share in (some_prompts()[:2], some_prompts()[2:])]
    joined = torch.cat([part.scores for part in parts])
    torch.testing.assert_close(joined, table.scores, atol=1e-5, rtol=0)


# --- bad requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"answer": []}, {}, "prompt 0 has no answer: .*score_heads_by"),
        ({"spans": []}, {}, "expected at least one"),
        ({"spans": [(5, 5)]}, {}, "0 <= start < end"),
        ({"spans": [(5, 99)]}, {}, "prompt 0 of 13 tokens"),
        ({}, {"alpha": 0.0}, "alpha=0.0"),
        ({}, {"heads": []}, "no heads: .*None for all"),
    ],
)
def test_a_bad_request_is_one_clear_error(llama, changes, options, said):
    (p,) = some_prompts(1)
    with pytest.raises(ValueError, match=said):
        score_heads(llama, [p._replace(**changes)], **options)


# --- choosing ----------------------------------------------------------------------------------

A = of([[[4.0, 3, 2, 1], [0, -1, -2, -3]]])
B = of([[[1.0, 4, 3, -3], [2, -2, -1, 0]]])


def test_heads_are_ranked_by_their_mean_and_gain_is_over_the_baseline():
    scores = of([[[1.0, 2.0]], [[3.0, 0.0]]], baseline=0.5)
    assert scores.ranked() == [(0, 0), (0, 1)]
    assert scores.gain.tolist() == [[1.5, 0.5]]
    assert of([[[math.nan, 1.0]]]).ranked() == [(0, 1)]


def test_multi_task_heads_are_in_every_top_k():
    assert A.top(3) == [(0, 0), (0, 1), (0, 2)]
    assert B.top(3) == [(0, 1), (0, 2), (1, 0)]
    assert intersection([A, B], 3) == [(0, 1), (0, 2)]
    assert shared_top_k([A, B], 2) == [(0, 1), (0, 2)]
    assert intersection([A, A], 5) == A.top(5)


def test_heads_for_a_task_come_from_its_table_from_all_or_from_the_others():
    found = select_heads({"a": A, "b": B}, "a", 3)
    assert found["task-specific"] == A.top(3)
    assert found["multi-task"] == shared_top_k([A, B], 3) != B.top(3)
    assert found["task-agnostic"] == B.top(3)


def test_random_heads_of_several_draws_share_n_times_k_by_n_to_the_m():
    shared, draws = 0, 300
    for i in range(draws):
        picks = [set(random_heads(SIZE, 5, seed=10 * i + task)) for task in range(3)]
        shared += len(set.intersection(*picks)) / draws
    assert shared == pytest.approx(8 * (5 / 8) ** 3, abs=0.2)


def test_stability_is_one_where_all_prompts_agree_and_a_coin_where_they_do_not():
    sure = of([[[3.0, 2, 1, 0]]] * 20)
    assert stability(sure, 2).round(decimals=4).tolist() == [[1, 1, 0, 0]]
    torn = of([[[1.0, 0.0]], [[0.0, 1.0]]] * 200)
    often = stability(torn, 1, resamples=400)
    assert often.sum().item() == pytest.approx(1)
    assert 0.35 < often[0, 0].item() < 0.65


@pytest.mark.parametrize("k", [0, 9])
def test_more_heads_than_there_are_cannot_be_chosen(llama, k):
    for table in (A, screen_heads(llama, some_prompts(2), keep=k)):
        with pytest.raises(ValueError, match=f"k={k}: expected 1 <= k"):
            table.top(k)


# --- screening ---------------------------------------------------------------------------------


def test_the_slopes_are_the_limit_of_weak_steering(llama):
    examples, alpha, step = some_prompts(2), 0.01, 1e-3
    weak = naive_scores(llama, examples, alpha=alpha**step)
    limit = (weak.scores - weak.baseline[:, None, None]) / step
    slopes = bias_slopes(llama, examples, alpha=alpha, batch=1)
    torch.testing.assert_close(slopes, limit, atol=5e-3, rtol=2e-2)
    assert all(p.grad is None for p in llama.parameters())


def test_the_screen_finds_what_the_whole_search_finds(tiny):
    model, tokenizer = tiny
    some = to_prompts(tokenizer, TASKS["biasbios"].examples(16, seed=0, split="profile"))
    screen, whole = screen_heads(model, some, keep=2), score_heads(model, some)
    assert screening_regret(screen, whole, 2) == {"found": 1.0, "regret": 0.0}
    finalists = screen.scores.isnan().any(0).logical_not()
    assert finalists.sum() == 4
    same = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(screen.scores[:, finalists], whole.scores[:, finalists], **same)
    assert set(screen.top(2)) == set(whole.top(2))


def test_halving_doubles_the_prompts_until_all_are_met(monkeypatch):
    model = tiny_models.tiny("llama", num_hidden_layers=18, num_attention_heads=4)
    monkeypatch.setattr(head_search, "bias_slopes", lambda *_, **__: torch.randn(1, 18, 4))
    for keep, prompts_met in ((1, [5] * 3 + [2] * 3), (2, [5] * 6)):
        met = screen_heads(model, some_prompts(5), keep=keep).scores.isfinite().sum(0).flatten()
        assert met.sort(descending=True).values.tolist() == prompts_met + [0] * (72 - 6)


def test_the_regret_is_what_a_worse_choice_costs():
    chosen = torch.full_like(A.scores, math.nan)
    chosen[:, 0, [0, 3]] = A.scores[:, 0, [0, 3]]
    screen = HeadTable(chosen, A.baseline, A.about)
    assert screening_regret(screen, A, 2) == {"found": 0.5, "regret": (4 + 3 - 4 - 1) / 2}
