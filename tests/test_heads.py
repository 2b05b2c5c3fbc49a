"""The head search: equal to the naive loop, resumable, shared out, and what is chosen from it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product

import pytest
import tiny_models
import torch

from steerkit.lab.cli import main
from steerkit.steering import replay, search
from steerkit.steering.head_search import (
    HeadTable,
    Prompt,
    chance_overlap,
    choices,
    common,
    every_head,
    forced,
    intersection,
    load_table,
    naive_scores,
    padded,
    random_heads,
    read_heads,
    score_heads,
    score_heads_by,
    stability,
    union,
    write_heads,
)
from steerkit.steering.pasta import Head, emphasise
from steerkit.steering.screening import bias_slopes, compared, lost, screen_heads
from steerkit.steering.tasks import prompts
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
    ("first", "rows"), [(0, 1024), (3, 1024), (3, 64)], ids=["span at the start", "inside", "small"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox", "gpt2", "olmo2"])
def test_the_search_returns_the_naive_loops_scores(name, first, rows, monkeypatch):
    monkeypatch.setattr(search, "_one_by_one", None)  # no falling back
    monkeypatch.setitem(search._ROWS, "cpu", rows)  # 64: batches of one prompt, chunks of heads
    model, examples = tiny_models.tiny(name), some_prompts(first=first)
    fast, slow = score_heads(model, examples, batch=3), naive_scores(model, examples, batch=1)
    torch.testing.assert_close(fast.scores, slow.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(fast.baseline, slow.baseline, atol=1e-5, rtol=0)
    assert (slow.scores - slow.baseline[:, None, None]).abs().max() > 1e-2
    assert fast.about == slow.about


def test_a_score_is_the_mean_log_probability_of_the_answers_tokens(llama):
    (p,) = some_prompts(1)
    ids = torch.tensor([p.ids + p.answer])
    inside = torch.zeros(ids.shape, dtype=torch.bool)
    inside[0, p.spans[0][0] : p.spans[0][1]] = True
    inside[0, len(p.ids) :] = True  # the answer's own tokens keep their weight
    with torch.no_grad(), emphasise(llama, inside, [(1, 2)]):
        told = llama(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(len(p.ids), ids.shape[1])
    expected = sum(told[t - 1, ids[0, t]].item() for t in places) / len(p.answer)
    assert forced(llama, [p], [(1, 2)]).item() == pytest.approx(expected, abs=1e-6)


def test_an_architecture_that_cannot_be_replayed_gets_the_naive_loop(monkeypatch):
    from transformers import GraniteConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(**tiny_models.SIZE, logits_scaling=0.1)  # scaled after the vocabulary
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = some_prompts(2)
    assert not search._fits(model, examples[0], 0.01)
    fast, slow = score_heads(model, examples), naive_scores(model, examples)
    torch.testing.assert_close(fast.scores, slow.scores, atol=1e-5, rtol=0)


def test_half_precision_is_replayed_too(monkeypatch):
    monkeypatch.setattr(search, "_one_by_one", None)
    model, examples = tiny_models.tiny("llama", sharpen=1.0).bfloat16(), some_prompts(3)
    fast, slow = score_heads(model, examples), naive_scores(model, examples)
    torch.testing.assert_close(fast.scores, slow.scores, atol=0.05, rtol=0)


def test_alpha_one_is_the_baseline(llama):
    found = score_heads(llama, some_prompts(), alpha=1.0)
    expected = found.baseline[:, None, None].expand_as(found.scores)
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=0)


def test_memory_that_runs_out_halves_the_batch(llama, table, monkeypatch):
    whole, sizes = search._replayed, []

    def small(model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("as on a device")
        return whole(model, prompts, *rest)

    monkeypatch.setattr(search, "_replayed", small)
    found = score_heads(llama, some_prompts())
    torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
    assert sizes == [1, 5, 2, 3, 1, 2]  # the first asks whether the model can be replayed


def test_memory_that_holds_no_prompt_with_all_heads_takes_fewer_heads(llama, table, monkeypatch):
    whole, sizes = search._replayed, []

    def small(model, prompts, heads, *rest):
        if len(prompts) * len(heads) > 2:
            raise torch.OutOfMemoryError("as on a device")
        sizes.append(len(heads))
        return whole(model, prompts, heads, *rest)

    monkeypatch.setattr(search, "_replayed", small)
    found = score_heads(llama, some_prompts())
    torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
    assert set(sizes[1:]) == {2}


def test_no_heads_are_no_scores_where_a_model_cannot_be_replayed(llama):
    found, baseline = search._one_by_one(llama, some_prompts(2), [], 0.01)
    assert found.shape == (0, 2) and baseline.shape == (2,)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_that_ends_before_a_span_is_searched_exactly(name):
    model = tiny_models.tiny(name, sliding_window=8)
    ids = tiny_models.tokens(2, 44).tolist()
    prompts = [Prompt(ids[0][:40], [(1, 4)], ids[0][40:]), Prompt(ids[1][:40], [(30, 33)], [7, 8])]
    found = score_heads(model, prompts, batch=1)
    naive = naive_scores(model, prompts)
    torch.testing.assert_close(found.scores, naive.scores, atol=1e-5, rtol=0)


def test_memory_that_does_not_hold_one_prompt_is_an_error(llama, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("as on a device")

    monkeypatch.setattr(search, "_replayed", never)
    with pytest.raises(torch.OutOfMemoryError):
        score_heads(llama, some_prompts(2))


def test_the_model_is_left_as_it_was(llama):
    before = llama.config._attn_implementation
    hooks = sum(len(m._forward_pre_hooks) for m in llama.modules())
    score_heads(llama, some_prompts(2))
    assert llama.config._attn_implementation == before
    assert sum(len(m._forward_pre_hooks) for m in llama.modules()) == hooks
    assert not any(key.startswith("_steerkit") for m in llama.modules() for key in m.__dict__)


def test_other_metrics_make_tables_too(llama):
    examples = some_prompts(3)

    def measure(steer):
        ids, keep, _ = padded(examples)
        with torch.no_grad():
            if steer is None:
                return llama(ids).logits[:, -1, 0]
            with steer(llama, keep):
                return llama(ids, use_cache=False).logits[:, -1, 0]

    found = score_heads_by(llama, measure, heads=[(1, 0), (0, 3)], name="one logit")
    assert set(found.ranked()) == {(1, 0), (0, 3)}
    assert found.about["score"] == "one logit"
    direct = measure(partial(emphasise, heads=[(1, 0)], alpha=0.01))
    torch.testing.assert_close(found.scores[:, 1, 0], direct)


# --- on disk -----------------------------------------------------------------------------------


def test_a_table_comes_back_from_disk(table, tmp_path):
    table.save(tmp_path / "t.json")
    again = load_table(tmp_path / "t.json")
    torch.testing.assert_close(again.scores, table.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.baseline, table.baseline, atol=1e-6, rtol=0)
    assert again.about == table.about


def test_a_search_goes_on_where_its_file_ends(llama, table, tmp_path, monkeypatch):
    path, done = tmp_path / "t.json", every_head(*SIZE)[:5]
    score_heads(llama, some_prompts(), heads=done, resume=path)
    worked = []
    whole = replay.Replay.variants

    def watch(self, layer, indices):
        worked.extend((layer, i) for i in indices)
        return whole(self, layer, indices)

    monkeypatch.setattr(replay.Replay, "variants", watch)
    found = score_heads(llama, some_prompts(), resume=path)
    torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
    assert set(worked) - {(0, 0)} == set(every_head(*SIZE)[5:])  # L0H0: can it be replayed?
    worked.clear()
    score_heads(llama, some_prompts(), resume=path)
    assert not worked  # the whole table is there


CHILD = """
import sys, time, torch, tiny_models
from steerkit.steering import search
from steerkit.steering.head_search import score_heads
from test_heads import some_prompts
slow = float(sys.argv[2])
whole = search._replayed
def dawdle(*given):
    time.sleep(slow)
    return whole(*given)
search._replayed = dawdle
score_heads(tiny_models.tiny("llama"), some_prompts(), batch=1, resume=sys.argv[1], save_every=0)
"""


def child(*args: str, **options) -> subprocess.Popen:
    here = os.path.dirname(__file__)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]])}
    return subprocess.Popen([sys.executable, "-c", CHILD, *args], env=env, **options)


def test_a_killed_search_leaves_a_whole_table_and_can_be_finished(llama, table, tmp_path):
    path = tmp_path / "t.json"
    running = child(str(path), "0.5")
    while not path.exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    part = load_table(path)
    assert 0 < part.scores.isnan().sum() < part.scores.numel()
    found = score_heads(llama, some_prompts(), resume=path)
    torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.baseline, table.baseline, atol=1e-5, rtol=0)


def test_a_table_cut_in_the_middle_is_refused(llama, table, tmp_path):
    path = tmp_path / "t.json"
    table.save(path)
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"not a whole head table .*cut\? delete it"):
        score_heads(llama, some_prompts(), resume=path)
    path.write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="not a whole head table"):
        load_table(path)


def test_a_table_about_something_else_is_refused(llama, table, tmp_path):
    path = tmp_path / "t.json"
    table.save(path)
    with pytest.raises(ValueError, match=r"a table of other alpha \(0.01, not 0.1\)"):
        score_heads(llama, some_prompts(), alpha=0.1, resume=path)
    with pytest.raises(ValueError, match="a table of other prompts"):
        score_heads(llama, some_prompts(4), resume=path)
    with pytest.raises(ValueError, match="a table of other weights"):
        score_heads(tiny_models.tiny("llama", seed=1), some_prompts(), resume=path)


def test_two_processes_share_the_heads_and_both_get_the_table(table, tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "shared.py"
    script.write_text(
        "import os, sys, torch, tiny_models\n"
        "from accelerate import PartialState\n"
        "from steerkit.steering.head_search import load_table, score_heads\n"
        "from test_heads import some_prompts\n"
        "state = PartialState(cpu=True)\n"
        "assert state.num_processes == 2\n"
        "found = score_heads(tiny_models.tiny('llama'), some_prompts(), resume=sys.argv[1])\n"
        "found.save(sys.argv[1] + f'.of{state.process_index}')\n"
    )
    # On a CPU accelerate starts several processes by mpirun, or by torch's launcher, as here.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.environ["PYTHONPATH"]])
    env = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    command = [*launch, *options, str(script), str(tmp_path / "t")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("t", "t.of0", "t.of1"):
        found = load_table(tmp_path / name)
        torch.testing.assert_close(found.scores, table.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.baseline, table.baseline, atol=1e-5, rtol=0)


def test_the_official_head_files_are_read_and_written(llama, tmp_path):
    path, heads = tmp_path / "h.json", [Head(1, 3), Head(0, 2), Head(1, 0)]
    write_heads(path, heads)
    assert json.loads(path.read_text()) == {"1": [3, 0], "0": [2]}
    assert read_heads(path, llama) == [(1, 3), (1, 0), (0, 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"17": [3]}', "L17H3 is not in a model of 2 layers of 4 heads; .*another model's"),
        ('{"1": [4]}', "L1H4 is not in a model of 2 layers of 4 heads"),
        ('{"1": [0, 2', r"not a head file .*expected \{\"layer\": \[heads\]\}"),
        ('{"one": [1]}', "not a head file"),
        ('{"1": ["a"]}', "not a head file"),
        ("[[1, 2]]", "not a head file"),
        ("{}", "no heads in it"),
    ],
)
def test_a_bad_head_file_is_one_clear_error(llama, tmp_path, text, said):
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_heads(tmp_path / "h.json", llama)


# --- bad requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"answer": []}, {}, r"examples \[0\] have no answer: .*score_heads_by"),
        ({"spans": []}, {}, "expected at least one"),
        ({"spans": [(5, 5)]}, {}, "0 <= start < end"),
        ({"spans": [(5, 99)]}, {}, "a prompt of 13 tokens"),
        ({}, {"alpha": 0.0}, "alpha=0.0"),
        ({}, {"alpha": math.nan}, "alpha=nan"),
        ({}, {"batch": 0}, "batch=0"),
        ({}, {"heads": [(2, 0)]}, "L2H0 is not in a model of 2 layers of 4 heads"),
    ],
)
def test_a_bad_request_is_one_clear_error(llama, changes, options, said):
    (p,) = some_prompts(1)
    with pytest.raises(ValueError, match=said):
        score_heads(llama, [p._replace(**changes)], **options)


def test_no_examples_are_refused(llama):
    with pytest.raises(ValueError, match="no examples"):
        score_heads(llama, [])


# --- choosing ----------------------------------------------------------------------------------

A = of([[[4.0, 3, 2, 1], [0, -1, -2, -3]]])
B = of([[[1.0, 4, 3, -3], [2, -2, -1, 0]]])


def test_heads_are_ranked_by_their_mean_and_gain_is_over_the_baseline():
    scores = of([[[1.0, 2.0]], [[3.0, 0.0]]], baseline=0.5)
    assert scores.ranked() == [(0, 0), (0, 1)]
    assert scores.gain.tolist() == [[1.5, 0.5]]
    assert of([[[math.nan, 1.0]]]).ranked() == [(0, 1)]


def test_multi_task_heads_are_in_every_top_k_and_the_union_in_any():
    assert A.top(3) == [(0, 0), (0, 1), (0, 2)]
    assert B.top(3) == [(0, 1), (0, 2), (1, 0)]
    assert intersection([A, B], 3) == [(0, 1), (0, 2)]
    assert set(union([A, B], 3)) == {(0, 0), (0, 1), (0, 2), (1, 0)}
    assert common([A, B], 2) == ([(0, 1), (0, 2)], 3)
    assert intersection([A, A], 5) == A.top(5)
    for tables, k in product(([A, B], [A]), range(1, 9)):
        assert len(union(tables, k)) + len(intersection(tables, k)) == k * 2


def test_heads_for_a_task_come_from_its_table_from_all_or_from_the_others():
    found = choices({"a": A, "b": B}, "a", 3)
    assert found["task-specific"] == A.top(3)
    assert found["multi-task"] == common([A, B], 3)[0] != B.top(3)
    assert found["task-agnostic"] == B.top(3)


def test_the_chance_line_is_the_mean_overlap_of_random_choices():
    assert chance_overlap(1024, 300, 4) == pytest.approx(7.54, abs=0.01)  # LLaMA-7B's 25 heads
    draws = 300
    for tasks, k in ((2, 3), (3, 5)):
        shared = 0
        for i in range(draws):
            picks = [set(random_heads(SIZE, k, seed=10 * i + t)) for t in range(tasks)]
            shared += len(set.intersection(*picks)) / draws
        assert shared == pytest.approx(chance_overlap(8, k, tasks), abs=0.2)


def test_random_heads_are_a_control_without_the_chosen_ones():
    found = random_heads(SIZE, 4, seed=0, without=A.top(4))
    assert len(set(found)) == 4
    assert not set(found) & set(A.top(4))
    assert found == random_heads(SIZE, 4, seed=0, without=A.top(4))
    with pytest.raises(ValueError, match="k=9: expected 1 <= k <= 8"):
        random_heads(SIZE, 9, seed=0)


def test_stability_is_one_where_all_prompts_agree_and_a_coin_where_they_do_not():
    sure = of([[[3.0, 2, 1, 0]]] * 20)
    assert stability(sure, 2).round(decimals=4).tolist() == [[1, 1, 0, 0]]
    torn = of([[[1.0, 0.0]], [[0.0, 1.0]]] * 200)
    often = stability(torn, 1, resamples=400)
    assert often.sum().item() == pytest.approx(1)
    assert 0.35 < often[0, 0].item() < 0.65


@pytest.mark.parametrize("k", [0, 9])
def test_more_heads_than_there_are_cannot_be_chosen(k):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 <= k <= 8"):
        A.top(k)


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
    some = prompts(tokenizer, TASKS["biasbios"].examples(16, seed=0, split="profile"))
    screen, whole = screen_heads(model, some, keep=2), score_heads(model, some)
    assert lost(screen, whole, 2) == {"found": 1.0, "regret": 0.0}
    finalists = screen.table.scores.isnan().any(0).logical_not()
    assert finalists.sum() == screen.rounds[-1][0] == 4
    torch.testing.assert_close(
        screen.table.scores[:, finalists], whole.scores[:, finalists], atol=1e-5, rtol=0
    )
    assert set(screen.table.top(2)) == set(whole.top(2))


def test_halving_doubles_the_prompts_until_all_are_met(monkeypatch):
    model = tiny_models.tiny("llama", num_hidden_layers=12, num_attention_heads=4)
    from steerkit.steering import screening

    monkeypatch.setattr(screening, "rank", lambda mean: every_head(12, 4)[::-1])
    examples = some_prompts(5)
    found = screen_heads(model, examples, keep=1, share=0.2)
    assert found.rounds == [(4, 5)]
    found = screening.screen_heads(model, examples * 4, keep=1)
    assert found.rounds[-1][1] == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [({"keep": 0}, "keep=0"), ({"keep": 7}, "keep=7"), ({"share": 0}, "share=0")],
)
def test_a_bad_screen_is_one_clear_error(llama, options, said):
    with pytest.raises(ValueError, match=said):
        screen_heads(llama, some_prompts(2), **options)


def test_lost_measures_what_a_worse_choice_costs():
    found = screen_of([Head(0, 0), Head(0, 3)])
    assert lost(found, A, 2) == {"found": 0.5, "regret": pytest.approx((4 + 3 - 4 - 1) / 2)}


def test_what_is_compared_is_what_the_searches_return(llama):
    some = some_prompts(3)
    found = compared(llama, some, keep=2)
    screen, exact = screen_heads(llama, some, keep=2), score_heads(llama, some)
    assert {k: found[k] for k in ("found", "regret")} == pytest.approx(lost(screen, exact, 2))
    assert found["off"] < 1e-5
    assert min(found["exact"], found["screen"]) > 0


def screen_of(heads):
    from steerkit.steering.screening import Screen

    scores = torch.full_like(A.scores, math.nan)
    for head in heads:
        scores[(slice(None), *head)] = A.scores[(slice(None), *head)]
    return Screen(HeadTable(scores, A.baseline, A.about), A.mean, [(2, 1)])


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_heads_and_tables_and_goes_on_from_them(tmp_path, capsys):
    out = tmp_path / "heads.json"
    command = ["profile-heads", "--tasks", "biasbios", "counterfact", "--out", str(out), "-n", "3"]
    assert main([*command, "--size", "2", "--device", "cpu"]) == 0
    heads = read_heads(out)
    assert len(heads) == 2
    tables = [load_table(tmp_path / f"heads.json.{t}.table") for t in ("biasbios", "counterfact")]
    assert set(heads) == set(common(tables, 2)[0])
    assert "2 heads of the top" in capsys.readouterr().out
    before = (tmp_path / "heads.json.biasbios.table").read_text()
    assert main([*command, "--size", "2", "--device", "cpu"]) == 0
    assert (tmp_path / "heads.json.biasbios.table").read_text() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "poems"], "task 'poems': expected one of"),
        (["--tasks", "json", "--data", "json", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--tasks", "json", "--data", "biasbios", "b.csv"], "--data biasbios: not among --tasks"),
        (["--tasks", "json", "--alpha", "0"], "alpha=0.0"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, capsys, more, said):
    assert main(["profile-heads", "--out", str(tmp_path / "h"), "-n", "2", *more]) == 2
    assert said in capsys.readouterr().err
