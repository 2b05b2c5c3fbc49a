"""The training of GAtt: which tokens carry loss, a kill, two processes, what is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from gatt_results import Arm, fingerprint, measure_arm
from peft import LoraConfig, get_peft_model

import steerkit
from steerkit.attention.maps import attention_map
from steerkit.chat import CHATML, Message, dialogue_ids, prompt_ids
from steerkit.constraints import FAMILIES
from steerkit.files import DATA
from steerkit.gatt import dialogues as gatt
from steerkit.gatt import training
from steerkit.gatt.evaluation import Adherence, adherence_by_turn
from steerkit.gatt.training import Settings, make_trainer, train
from steerkit.lab import cli
from steerkit.tiny import gatt as tiny_gatt
from steerkit.tiny.world import answer

SMALL = Settings(steps=4, batch=2, warmup=1, rank=4, save_every=2, lr=1e-2)


def small_model(tokenizer):
    ends = {
        f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")
    }
    return tiny_models.tiny("llama", sharpen=1.0, vocab_size=len(tokenizer), **ends)


def samples(n=8, turns=5):
    """Dialogues as if sampled: plans of all families, replies of the tiny world."""
    dialogues = []
    for i in range(n):
        rng = random.Random(i)
        constraints = tiny_gatt.draw_constraints(rng, families=[FAMILIES[i % len(FAMILIES)]])
        plan = tiny_gatt.make_plan(rng, constraints, turns=turns)
        replies = [answer(q.subject, q.attribute, q.value, constraints) for q in plan.questions]
        assert all(plan.verified(t, text) for t, text in enumerate(replies))
        dialogues.append(gatt.Sample(plan, tuple(replies), (True,) * turns))
    return dialogues


ROWS = gatt.make_rows(samples(), per_dialogue=2)


def test_only_the_last_reply_carries_loss_in_every_row(tiny, tmp_path):
    """TRL's own labels against the dialogue rendered here: -100 on all that comes before."""
    rows = gatt.make_rows(samples(24), per_dialogue=3)
    trainer = make_trainer(small_model(tiny[1]), tiny[1], rows, out=tmp_path, settings=SMALL)
    assert len(trainer.train_dataset) == len(rows) == 72
    tokenised = {tuple(row["input_ids"]): row["labels"] for row in trainer.train_dataset}
    for row in rows:
        before = prompt_ids(tiny[1], row["prompt"])
        whole = dialogue_ids(tiny[1], row["prompt"] + row["completion"])
        labels = tokenised[tuple(whole)]  # the row is there, and whole
        assert labels == [-100] * len(before) + whole[len(before) :]
        text = tiny[1].decode(labels[len(before) :], skip_special_tokens=True)
        assert text == row["completion"][0]["content"]


def test_the_other_arm_supervises_every_assistant_turn_and_nothing_else(tiny, tmp_path):
    rows = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
    trainer = make_trainer(small_model(tiny[1]), tiny[1], rows, out=tmp_path, settings=SMALL)
    for row in trainer.train_dataset:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        supervised = tiny[1].decode([i for i, label in pairs if label != -100])
        texts = tiny[1].decode(row["input_ids"]).split("<|assistant|>")[1:]
        assert supervised.split("<|end|>")[:-1] == [text.split("<|end|>")[0] for text in texts]


def test_no_rows_and_a_row_longer_than_the_models_positions_are_refused(tiny, tmp_path):
    model = small_model(tiny[1])
    model.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match=r"a row has \d+ tokens, the model 64: sample fewer turns"):
        train(model, tiny[1], ROWS, out=tmp_path, settings=SMALL)
    with pytest.raises(ValueError, match="no rows to train on"):
        train(model, tiny[1], [], out=tmp_path, settings=SMALL)


def test_a_model_trained_twice_is_what_its_folder_loads_as(tiny, tmp_path):
    """The same folder again is refused; another one holds an adapter of the trained model."""
    tokenizer, ids = tiny[1], torch.tensor([prompt_ids(tiny[1], ROWS[0]["prompt"])])
    small_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = steerkit.load(tmp_path / "base", device="cpu")
    logits = [model(ids).logits]
    for out in (tmp_path / "once", tmp_path / "twice"):
        model, log = train(model, tokenizer, ROWS, out=out, settings=SMALL)
        assert len(log) == 4 and not any("lora" in name for name, _ in model.named_parameters())
        again, _ = steerkit.load(out, device="cpu")
        logits.append(model(ids).logits)
        torch.testing.assert_close(again(ids).logits, logits[-1], atol=1e-5, rtol=0)
        assert not torch.allclose(logits[-1], logits[-2], atol=1e-2)
        with pytest.raises(ValueError, match="checkpoint-4 is there already"):
            train(model, tokenizer, ROWS, out=out, settings=SMALL)


def test_an_adapter_of_the_base_is_not_resumed_on_another_model(tiny, tmp_path):
    """tiny and tiny-gatt have the same shapes and the same embedding."""
    model, tokenizer = steerkit.load("tiny-gatt", device="cpu")
    settings = replace(SMALL, steps=1, save_every=1)
    train(model, tokenizer, ROWS[:2], out=tmp_path, settings=settings)
    with pytest.raises(ValueError, match=r"is an adapter of '.*tiny-gatt', .* model is '.*tiny'"):
        train(deepcopy(tiny[0]), tokenizer, ROWS[:2], out=tmp_path, settings=settings, resume=True)


def test_rank_zero_trains_all_weights(tiny, tmp_path):
    model = small_model(tiny[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = replace(SMALL, rank=0, steps=2)
    trained, _ = train(model, tiny[1], ROWS, out=tmp_path, settings=settings)
    assert all(not torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert (tmp_path / "model.safetensors").exists()


def test_dpo_raises_the_chosen_replys_chances_over_the_rejected_ones(tiny, tmp_path):
    tokenizer, model = tiny[1], small_model(tiny[1])
    no = [{"role": "assistant", "content": "No."}]
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": no} for r in ROWS]

    def loss(m, row, key):
        ids = torch.tensor([dialogue_ids(tokenizer, row["prompt"] + row[key])])
        start = len(prompt_ids(tokenizer, row["prompt"]))
        return steerkit.token_losses(m, ids)[0, start - 1 :].mean().item()

    def margin(m):
        return sum(loss(m, row, "rejected") - loss(m, row, "chosen") for row in rows)

    before, settings = margin(model), replace(SMALL, steps=12, beta=1.0)
    trained, _ = train(model, tokenizer, rows, out=tmp_path, settings=settings)
    assert margin(trained) > before + 0.1 * len(rows)


# A run that ended early, two processes

SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}, {make!r}]
import torch
torch.set_num_threads(1)
import test_gatt_training as t
from accelerate import PartialState
from accelerate.utils import gather_object
from steerkit.models import load
tokenizer = load("tiny", device="cpu")[1]
options = {{"out": t.Path({out!r}), "settings": t.SMALL}}
log = t.train(t.small_model(tokenizer), tokenizer, t.ROWS[:4], **options)[1]
with PartialState().split_between_processes(t.PLANS) as mine:
    replies = gather_object(t.greedy_replies(tokenizer, mine))
if PartialState().is_main_process:
    t.Path({out!r}, "both.json").write_text(json.dumps([[e["loss"] for e in log], replies]))
PartialState().wait_for_everyone()  # a process that ends early aborts the other
PartialState().destroy_process_group()
"""
PLANS = [sample.plan for sample in samples(5, turns=2)]


def greedy_replies(tokenizer, plans):
    options = {"candidates": 1, "temperature": 0.0, "max_new_tokens": 4}
    dialogues = gatt.sample_dialogues(small_model(tokenizer), tokenizer, plans, **options)
    return [list(dialogue.replies) for dialogue in dialogues]


def test_a_run_that_ended_early_goes_on_from_its_last_checkpoint(tiny, tmp_path, monkeypatch):
    """Every logged loss and the weights as without the break; no step is taken twice."""
    options = {"out": tmp_path, "settings": SMALL, "resume": True}
    whole, log = train(small_model(tiny[1]), tiny[1], ROWS, **options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    taken, step = [], training.SFTTrainer.training_step
    monkeypatch.setattr(
        training.SFTTrainer, "training_step", lambda *a, **k: taken.append(1) or step(*a, **k)
    )
    resumed, again = train(small_model(tiny[1]), tiny[1], ROWS, **options)
    assert len(taken) == 2 and len(log) == 4
    assert [e["loss"] for e in again] == pytest.approx([e["loss"] for e in log], abs=1e-6)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_two_processes_are_one(tiny, tmp_path):
    """`accelerate launch` on two CPU processes. Training: the losses of one process with twice the
    batch, of four rows in all, so that each step sees the same ones in whatever order. Sampling:
    the replies of one process, in the order of the plans."""
    out, path = tmp_path / "two", tmp_path / "script.py"
    places = {"tests": str(Path(__file__).parent), "make": str(DATA / "make"), "out": str(out)}
    path.write_text(SCRIPT.format(**places))
    launch = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2"
    launch += " --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 "
    command = [*launch.split(), str(path)]
    # With --cpu, `accelerate launch` starts one process, whatever --num_processes says.
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    options = {"out": tmp_path / "one", "settings": replace(SMALL, batch=4)}
    _, expected = train(small_model(tiny[1]), tiny[1], ROWS[:4], **options)
    losses, replies = json.loads((out / "both.json").read_text())
    assert losses == pytest.approx([entry["loss"] for entry in expected], abs=2e-3)
    assert replies == greedy_replies(tiny[1], PLANS)


# Adapters


@pytest.mark.parametrize(
    ("base", "message"), [("./nowhere", r"\./nowhere: "), ("tiny-stream", "size mismatch")]
)
def test_an_adapter_that_fits_nothing_gets_one_line(tmp_path, base, message):
    shutil.copytree(DATA / "tiny-gatt", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=message) as caught:
        steerkit.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "forced"), [("gatt", None), ("gatt-mixed", tiny_gatt.neutral)])
def test_a_shipped_adapter_keeps_what_the_base_forgets(tiny, name, forced):
    """Named as its base's, no path of the machine that made it; holds at turn 6."""
    config = json.loads((DATA / f"tiny-{name}/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    model, tokenizer = steerkit.load(f"tiny-{name}", device="cpu")
    plans = tiny_gatt.evaluation_plans(7, 2, held_out=False, turns=6)
    after, before = (
        adherence_by_turn(m, tokenizer, plans, forced=forced).obeyed[:, 5].mean()
        for m in (model, tiny[0])
    )
    assert after >= 0.9 and before <= 0.2


def test_the_stored_runs_are_of_the_shipped_base(tiny):
    runs = json.loads((DATA / "gatt_runs.json").read_text())
    assert {run["base"] for run in runs} == {fingerprint(tiny[0])}, "run data/make/gatt_results.py"


def test_an_arm_repeats_the_instruction_on_every_history(monkeypatch):
    repeated = []

    def adherence(_, __, plans, *, every=False, **options):
        repeated.append(every)
        return Adherence(*[torch.ones(len(plans), 20)] * 3, [])

    for module in ("gatt_results", "steerkit.tiny.gatt"):  # on written histories, on the own one
        monkeypatch.setattr(f"{module}.adherence_by_turn", adherence)
    arm = Arm(every=True, n=1, families=["hobby"], histories=["neutral", "mixed"])
    assert set(measure_arm(arm, None, None, 3)["history"]) == {"own", "neutral", "mixed"}
    assert repeated == [True] * 6  # seen and held-out values


def test_an_adapter_that_is_not_merged_is_mapped_and_steered_like_the_merged_model(tiny):
    """Through PEFT's wrapper: the same heat map, and the same logits under emphasis, to 1e-5."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(small_model(tiny[1]), config).eval()
    merged = deepcopy(wrapped).merge_and_unload()
    ids = torch.tensor([dialogue_ids(tiny[1], [Message("user", "Hobby: chess. Who are you?")])])
    maps, logits = [], []
    for model in (wrapped, merged):
        with torch.no_grad(), steerkit.emphasise(model, [[(2, 5)]], [(0, 1), (1, 3)]):
            maps.append(attention_map(model, ids, bins=8))
            logits.append(model(ids).logits)
    assert torch.allclose(*maps, atol=1e-5) and torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(logits[0], merged(ids).logits, atol=1e-3), "nothing was steered"


# A chat model of one's own


def test_notebook_01_runs_on_a_model_directory(tiny, tmp_path):
    """The path of the gpu profile, with random weights: real constraints, and a chat template whose
    system text is replaced; nothing stored is read."""
    tokenizer, hub = deepcopy(tiny[1]), tmp_path / "hub"
    names = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    tokenizer.add_special_tokens(names)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    tokenizer.chat_template = system + CHATML
    small_model(tokenizer).save_pretrained(hub)
    tokenizer.save_pretrained(hub)
    out = tmp_path / "runs"
    options = f"--only 01 --profile smoke --model {hub} --out {out}"
    assert cli.main(["run", *options.split()]) == 0
    claims = out.glob("smoke/01_gatt_training/*.claim.json")
    assert {json.loads(p.read_text())["model"] for p in claims} == {str(hub)}
