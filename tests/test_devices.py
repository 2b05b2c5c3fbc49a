"""What the gpu profile needs and a CPU can show: tensors that stay on the model's device, bfloat16,
and a model that accelerate has spread over memory and disk."""

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import elsewhere
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import steerkit
from steerkit.attention import maps, record
from steerkit.attention.heads import Head
from steerkit.gatt import dialogues as gatt
from steerkit.gatt import evaluation as gatt_eval
from steerkit.gatt.training import Settings, train
from steerkit.steering import head_search, tasks
from steerkit.steering import head_search as heads
from steerkit.steering import other_methods as relatives
from steerkit.steering.pasta import emphasise
from steerkit.streaming import latency as timing
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.sink_cache import SinkCache
from steerkit.tiny import gatt as tiny_gatt
from steerkit.tiny.tasks import TASKS

IDS = torch.randint(300, (1, 48), generator=torch.Generator().manual_seed(0))
SPAN, HEADS, SOME = (8, 16), [Head(1, 2), Head(3, 5)], [Head(0, 0), Head(2, 3)]
Step = Callable[[Model, Tokenizer, Tensor], Tensor]


def steered(way: Callable, **options: object) -> Step:
    """Logits under one way of steering, the first two tokens padding on the left."""

    def step(model: Model, _: Tokenizer, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        mask[:, :2] = 0
        with way(model, [[SPAN]], heads=HEADS, **options):
            return model(ids, attention_mask=mask).logits[:, 2:].log_softmax(-1)

    return step


def written(model: Model, ids: Tensor, **options: object) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)


def emphasised(model: Model, _: Tokenizer, ids: Tensor) -> Tensor:
    with emphasise(model, [[SPAN]], HEADS):
        return written(model, ids, do_sample=False)


def chat(model: Model, tokenizer: Tokenizer, _: Tensor) -> Tensor:
    replies = stream_chat(model, tokenizer, ["Hi.", "And?"], window=24, max_new_tokens=6)
    return torch.tensor([token for r in replies for token in tokenizer(r.text).input_ids])


def gatt_turns(model: Model, tokenizer: Tokenizer, _: Tensor) -> Tensor:
    rng = random.Random(0)
    plans = [tiny_gatt.make_plan(rng, tiny_gatt.draw_constraints(rng), turns=2) for _ in range(2)]
    gatt.sample_dialogues(model, tokenizer, plans, candidates=2, max_new_tokens=6)
    found = gatt_eval.adherence_by_turn(model, tokenizer, plans, max_new_tokens=6, probe_turns=(2,))
    return torch.cat([found.obeyed.flatten(), found.recalled.nan_to_num().flatten()])


def examples(tokenizer: Tokenizer) -> list[heads.Prompt]:
    return tasks.to_prompts(tokenizer, TASKS["biasbios"].examples(3, seed=0))


def replies(model: Model, tokenizer: Tokenizer, _: Tensor) -> Tensor:
    some, steer = TASKS["biasbios"].examples(3, seed=0), partial(emphasise, heads=HEADS)
    texts = tasks.generate(model, tokenizer, some, steer=steer, max_new_tokens=8)
    return torch.tensor([token for text in texts for token in tokenizer(text).input_ids])


NUMBERS: dict[str, Step] = {
    "losses": lambda m, _, ids: steerkit.token_losses(m, ids, sinks=2, window=12, block=16),
    "recomputed losses": lambda m, _, ids: steerkit.recomputed_losses(m, ids, length=12),
    "emphasise": steered(emphasise),
    "instaboost": steered(relatives.instaboost, multiplier=8),
    "spotlight": steered(relatives.spotlight),
    "split softmax": steered(relatives.split_softmax, exponent=0.5),
    "attention map": lambda m, _, ids: maps.attention_map(m, ids, bins=16),
    "span share": lambda m, _, ids: maps.span_share(m, ids, [SPAN]),
    "mass on a key": lambda m, _, ids: record.mean_weight_on_key(m, ids, k=0),
    "value norms": lambda m, _, ids: record.value_norms(m, ids).log(),
    "head scores": lambda m, t, _: heads.score_heads(m, examples(t), heads=SOME).scores,
    "head screen": lambda m, t, _: head_search.bias_slopes(m, examples(t)),
}
REPLIES: dict[str, Step] = {
    "generate with sinks": lambda m, _, ids: written(
        m, ids, past_key_values=SinkCache(m, sinks=2, window=20), do_sample=False
    ),
    "generate, emphasised": emphasised,
    "stream_chat": chat,
    "task replies": replies,
    "GAtt": gatt_turns,
    "pace": lambda m, *_: torch.tensor(len(timing.decode_pace(m, cache=8, repeats=1))),
}
EVERY = pytest.mark.parametrize("name", [*NUMBERS, *REPLIES])


@pytest.fixture(scope="module")
def plain(tiny) -> dict[str, Tensor]:
    """Each step on the CPU in float32."""
    with torch.no_grad():
        return {name: step(*tiny, IDS) for name, step in (NUMBERS | REPLIES).items()}


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    found = found.cpu().to(expected.dtype)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, equal_nan=True)


@EVERY
def test_nothing_is_left_on_the_cpu_when_the_model_is_elsewhere(name, tiny, plain) -> None:
    model = deepcopy(tiny[0])
    with elsewhere.moved(model):
        found = (NUMBERS | REPLIES)[name](model, tiny[1], IDS.to(model.device))
    close(found, plain[name], 1e-4)


@pytest.mark.parametrize("name", NUMBERS)
def test_bfloat16_stays_near_float32(name, tiny, plain) -> None:
    model = deepcopy(tiny[0]).bfloat16()
    with torch.no_grad():
        found = NUMBERS[name](model, tiny[1], IDS).float()
    close(found.nanmean(), plain[name].nanmean(), 0.05)
    assert (found - plain[name]).abs().nanmean() <= 0.05


def test_a_step_of_gatt_training_in_bfloat16_ends_in_finite_weights(tiny, tmp_path) -> None:
    plan = tiny_gatt.training_plans(0, dialogues=2, turns=2)[1]
    rows = gatt.make_rows([gatt.Sample(plan, ("Yes.", "No."), (True, True))], per_dialogue=1)
    model, settings = deepcopy(tiny[0]).bfloat16(), Settings(steps=1, batch=1, warmup=0)
    before = model(IDS).logits
    trained, (row, *_) = train(model, tiny[1], rows, out=tmp_path, settings=settings)
    assert 0 < row["loss"] < 20 and row["grad_norm"] > 0
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in trained.parameters())
    assert not torch.equal(trained(IDS).logits, before)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The embedded model under a device_map: half of it in memory, half of it on disk."""
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.norm": "disk"} | {
        f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(6)
    }
    options = {"device_map": places, "offload_folder": tmp_path_factory.mktemp("offload")}
    options |= {"dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(steerkit.models.DATA / "tiny", **options).eval()


@EVERY
def test_a_device_map_changes_nothing(name, tiny, spread, plain) -> None:
    with torch.no_grad():
        found = (NUMBERS | REPLIES)[name](spread, tiny[1], IDS)
    close(found, plain[name], 1e-4)
