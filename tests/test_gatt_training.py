"""The training of GAtt: which tokens carry loss, what a kill costs, two processes, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import steerkit
from steerkit.attention.maps import attention_map
from steerkit.chat import CHATML, dialogue_ids, prompt_ids
from steerkit.constraints import FAMILIES
from steerkit.files import ROOT
from steerkit.gatt import dialogues as gatt
from steerkit.gatt import evaluation as gatt_eval
from steerkit.gatt import training as gatt_training
from steerkit.gatt.training import IGNORED, Settings, check_rows, make_trainer, train
from steerkit.lab import runner
from steerkit.tiny import gatt as gatt_arms
from steerkit.tiny import world

SMALL = Settings(steps=4, batch=2, warmup=1, rank=4, save_every=2, lr=1e-2)


def small_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def samples(n=8, turns=5):
    """Dialogues as if sampled: plans of all families, replies of the tiny world."""
    found = []
    for i in range(n):
        rng = random.Random(i)
        given = gatt.draw(rng, families=[FAMILIES[i % len(FAMILIES)]])
        plan = gatt.make_plan(rng, given, turns=turns)
        replies = tuple(
            world.answer(q.subject, q.attribute, q.value, given) for q in plan.questions
        )
        assert all(plan.good(t, r) for t, r in enumerate(replies))
        found.append(gatt.Sample(plan, replies, (True,) * turns))
    return found


ROWS = gatt.make_rows(samples(), per_dialogue=2)


def test_only_the_last_reply_carries_loss_in_every_row(tiny, tmp_path):
    """TRL's own labels against the dialogue rendered here: -100 on all that comes before."""
    rows = gatt.make_rows(samples(24), per_dialogue=3)
    trainer = make_trainer(small_model(tiny[1]), tiny[1], rows, out=tmp_path, settings=SMALL)
    assert len(trainer.train_dataset) == len(rows) == 72
    found = {tuple(row["input_ids"]): row["labels"] for row in trainer.train_dataset}
    for row in rows:
        before = prompt_ids(tiny[1], [gatt.Message(**m) for m in row["prompt"]])
        whole = dialogue_ids(
            tiny[1], [gatt.Message(**m) for m in row["prompt"] + row["completion"]]
        )
        labels = found[tuple(whole)]  # the row is there, and whole
        assert labels == [IGNORED] * len(before) + whole[len(before) :]
        text = tiny[1].decode(labels[len(before) :], skip_special_tokens=True)
        assert text == row["completion"][0]["content"]


def test_the_other_arm_supervises_every_assistant_turn_and_nothing_else(tiny, tmp_path):
    rows = gatt.make_all_turns_rows(ROWS)
    trainer = make_trainer(small_model(tiny[1]), tiny[1], rows, out=tmp_path, settings=SMALL)
    for row in trainer.train_dataset:
        kept = [
            i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED
        ]
        said = tiny[1].decode(kept).split("<|end|>")[:-1]
        texts = tiny[1].decode(row["input_ids"]).split("<|assistant|>")[1:]
        assert said == [text.split("<|end|>")[0] for text in texts]


def test_a_row_that_is_too_long_is_an_error_and_not_cut(tiny, tmp_path):
    settings = replace(SMALL, max_length=64)
    with pytest.raises(ValueError, match=r"max_length is 64: the end would be cut off") as caught:
        train(small_model(tiny[1]), tiny[1], ROWS, out=tmp_path, settings=settings)
    assert "\n" not in str(caught.value)


def test_rows_that_vanish_or_carry_no_loss_are_errors():
    row = {"input_ids": [1, 2], "labels": [IGNORED, 2]}
    check_rows([row, row], ROWS[:2], 2)
    with pytest.raises(ValueError, match="1 of 2 rows were dropped"):
        check_rows([row], ROWS[:2], 2)
    with pytest.raises(ValueError, match="row 0 carries no loss"):
        check_rows([row | {"labels": [IGNORED] * 2}], ROWS[:1], 2)
    with pytest.raises(ValueError, match="no rows to train on"):
        make_trainer(None, None, [], out=Path(), settings=SMALL)


def test_lora_changes_the_model_and_the_saved_adapter_gives_the_same(tiny, tmp_path):
    """`load(DIR)` = base + merged adapter, by the base's directory; the base alone differs."""
    base, tokenizer = small_model(tiny[1]), tiny[1]
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = steerkit.load(tmp_path / "base", device="cpu")
    trained, log = train(model, tokenizer, ROWS, out=tmp_path / "run", settings=SMALL)
    assert len(log) == 4 and not any("lora" in name for name, _ in trained.named_parameters())
    ids = torch.tensor([dialogue_ids(tokenizer, [gatt.Message("user", "Hobby: chess.")])])
    again, _ = steerkit.load(tmp_path / "run", device="cpu")
    assert torch.allclose(again(ids).logits, trained(ids).logits, atol=1e-5)
    assert not torch.allclose(base(ids).logits, trained(ids).logits, atol=1e-2)


def test_rank_zero_trains_all_weights(tiny, tmp_path):
    model = small_model(tiny[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = replace(SMALL, rank=0, steps=2)
    trained, _ = train(model, tiny[1], ROWS, out=tmp_path, settings=settings)
    assert all(not torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert (tmp_path / "model.safetensors").exists()


def test_dpo_raises_the_chosen_replys_chances_over_the_rejected_ones(tiny, tmp_path):
    rows = [
        {
            "prompt": r["prompt"],
            "chosen": r["completion"],
            "rejected": [r["completion"][0] | {"content": "No."}],
        }
        for r in ROWS
    ]
    settings = replace(SMALL, steps=12, beta=1.0, save_every=50)
    model = small_model(tiny[1])

    def margin(m):
        total = 0.0
        for row in rows:
            before = [gatt.Message(**x) for x in row["prompt"]]
            for sign, key in ((1, "chosen"), (-1, "rejected")):
                ids = torch.tensor([dialogue_ids(tiny[1], [*before, gatt.Message(**row[key][0])])])
                start = len(prompt_ids(tiny[1], before))
                with torch.no_grad():
                    logs = m(ids).logits[0, start - 1 : -1].log_softmax(-1)
                total += sign * logs.gather(1, ids[0, start:, None]).mean().item()
        return total / len(rows)

    before = margin(model)
    trained, _ = train(model, tiny[1], rows, out=tmp_path, settings=settings)
    assert margin(trained) > before + 0.1


# A kill, two processes

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
import test_gatt_training as t
from steerkit.models import load
tokenizer = load("tiny", device="cpu")[1]
model = t.small_model(tokenizer)
s = t.replace(t.SMALL, steps={steps}, save_every=4, batch={batch})
t.train(model, tokenizer, t.ROWS[:{rows}], out=t.Path({out!r}), settings=s)
"""


def script(tmp_path, out, **options):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), **options))
    return str(path)


def final(out):
    """The last checkpoint's log: (step, loss) rows."""
    last = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_a_run_that_was_killed_ends_with_the_same_loss(tiny, tmp_path, monkeypatch):
    """SIGKILL after the first checkpoint, start again: every logged loss as without the kill, and
    no step that a checkpoint holds is taken twice."""
    steps, out = 38, tmp_path / "killed"  # every 3 steps would not divide a checkpoint's 4
    path = script(tmp_path, out, steps=steps, batch=2, rows=99)
    child = subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert child.poll() is None, child.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = int(gatt_training._last_checkpoint(out).rsplit("-", 1)[1])
    assert 0 < done < steps, "it had finished before the kill"
    taken, step = [], gatt_training.SFTTrainer.training_step
    monkeypatch.setattr(
        gatt_training.SFTTrainer, "training_step", lambda *a, **k: taken.append(1) or step(*a, **k)
    )
    settings = replace(SMALL, steps=steps, save_every=4)
    options = {"settings": settings}
    resumed, log = train(small_model(tiny[1]), tiny[1], ROWS, out=out, **options)
    assert len(taken) == steps - done
    whole, expected = train(small_model(tiny[1]), tiny[1], ROWS, out=tmp_path / "whole", **options)
    assert [r["step"] for r in log] == [r["step"] for r in expected]
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in expected], abs=1e-6)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_two_processes_of_two_rows_are_one_process_of_four(tiny, tmp_path):
    """`accelerate launch` on two CPU processes: the losses of one process with twice the batch.

    Of four rows in all, so that each step sees the same ones in whatever order.
    """
    out = tmp_path / "two"
    path = script(tmp_path, out, steps=4, batch=2, rows=4)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # With --cpu, `accelerate launch` starts one process, whatever --num_processes says.
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    settings = replace(SMALL, batch=4, save_every=4)
    options = {"out": tmp_path / "one", "settings": settings}
    train(small_model(tiny[1]), tiny[1], ROWS[:4], **options)
    assert final(out) == [
        (step, pytest.approx(loss, abs=2e-3)) for step, loss in final(tmp_path / "one")
    ]


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert gatt_training._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_training_directory_of_another_model_or_run_is_refused(tiny, tmp_path):
    options = {"settings": replace(SMALL, steps=1)}
    train(small_model(tiny[1]), tiny[1], ROWS, out=tmp_path, **options)
    with pytest.raises(ValueError, match=r"another run \(weights differ"):
        train(small_model(tiny[1], seed=1), tiny[1], ROWS, out=tmp_path, **options)
    with pytest.raises(ValueError, match=r"another run \(rows differ"):
        train(small_model(tiny[1]), tiny[1], ROWS[:3], out=tmp_path, **options)


# Adapters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "./nowhere"}, "no such directory"),
        ({"base_model_name_or_path": "tiny-stream"}, "size mismatch"),
        (None, "no adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_fits_nothing_gets_one_line(tmp_path, change, message):
    source = steerkit.models.DATA / "tiny-gatt"
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | (change or {})))
    if change is not None:
        weights = (source / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=message) as caught:
        steerkit.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_shipped_adapter_keeps_what_the_base_forgets(tiny):
    """Small, named as its base's, no path of the machine that made it; holds at turn 6."""
    folder = steerkit.models.DATA / "tiny-gatt"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1_000_000
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "tiny"
    )
    model, tokenizer = steerkit.load("tiny-gatt", device="cpu")
    plans = gatt_arms.evaluation_plans(7, 2, held_out=False, turns=6)
    rates = [
        gatt_eval.adherence_by_turn(m, tokenizer, plans).obeyed[:, 5].mean()
        for m in (model, tiny[0])
    ]
    assert rates[0] >= 0.9 and rates[1] <= 0.2


def test_stored_rows_are_read_as_they_were_written():
    rows = torch.tensor([[1, 0, torch.nan], [0, 0, 1]])
    assert gatt_arms.pack(rows) == ["10-", "001"]
    assert torch.equal(gatt_arms.unpack(["10-", "001"]).nan_to_num(9), rows.nan_to_num(9))


def test_an_adapter_that_is_not_merged_is_mapped_and_steered_like_the_merged_model(tiny):
    """Through PEFT's wrapper: the same heat map, and the same logits under emphasis, to 1e-5."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(small_model(tiny[1]), config).eval()
    merged = deepcopy(wrapped).merge_and_unload()
    ids = torch.tensor(
        [dialogue_ids(tiny[1], [gatt.Message("user", "Hobby: chess. Who are you?")])]
    )
    maps_, logits = [], []
    for model in (wrapped, merged):
        with torch.no_grad(), steerkit.emphasise(model, [[(2, 5)]], [(0, 1), (1, 3)]):
            maps_.append(attention_map(model, ids, bins=8))
            logits.append(model(ids).logits)
    assert torch.allclose(*maps_, atol=1e-5) and torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(logits[0], merged(ids).logits, atol=1e-3), "nothing was steered"


# A chat model of one's own


@pytest.fixture
def hub_style(tiny, tmp_path):
    """A directory as from the hub: random weights, and a chat template that adds a system text."""
    tokenizer = deepcopy(tiny[1])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML
    )
    small_model(tokenizer).save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def test_notebook_01_runs_on_a_model_directory(hub_style, tmp_path):
    """The path of the gpu profile: real constraints, the template replaced, nothing stored read."""
    path, out = ROOT / "notebooks" / "01_gatt_training.ipynb", tmp_path / "runs"
    out.mkdir()
    values = runner.overrides(path, profile="smoke", model=str(hub_style))
    places = {"out": out, "figures": tmp_path / "figures", "cwd": path.parent}
    done = runner.execute(path, values, profile="smoke", timeout=300, progress=False, **places)
    assert done.error is None, done.error
    claims = (tmp_path / "figures").glob("smoke/01_gatt_training/*.claim.json")
    assert {json.loads(p.read_text())["model"] for p in claims} == {str(hub_style)}
