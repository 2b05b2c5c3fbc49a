"""The training loop: its schedule, its loss, and a kill that leaves no trace."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerkit.fit import fit, next_token_loss, schedule


def small_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def batches(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 32, (4, 12), generator=generator)


def test_schedule_warms_up_holds_and_ends_near_zero():
    factors = [schedule(s, steps=100, warmup=10, decay=0.2) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and set(factors[10:80]) == {1.0}
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert 0 < factors[99] <= 1 / 20


def test_loss_is_the_mean_negative_log_likelihood_of_the_next_token():
    model, ids = small_model(), batches(0)
    logp = model(ids).logits.log_softmax(-1)[:, :-1]
    expected = -logp.gather(-1, ids[:, 1:, None]).mean()
    assert torch.allclose(next_token_loss(model, ids), expected, atol=1e-6)


def test_training_lowers_the_loss_on_a_repeated_batch():
    log = fit(small_model(), lambda _: batches(0), steps=60, lr=1e-2, warmup=1, log_every=10,
              every=10, progress=False)  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert log[-1]["tokens"] == 60 * 4 * 12


def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path):
    settings = {"steps": 20, "lr": 1e-2, "warmup": 2, "log_every": 5, "every": 10}
    whole = small_model()
    log = fit(whole, batches, out=tmp_path / "whole", progress=False, **settings)

    class Killed(Exception):
        pass

    def kill(step: int, _: torch.nn.Module) -> None:
        if step == 17:
            raise Killed

    with pytest.raises(Killed):
        fit(
            small_model(), batches, out=tmp_path / "torn", callback=kill, progress=False, **settings
        )
    with (tmp_path / "torn" / "log.jsonl").open("a") as file:
        file.write('{"step": 18, "lo')  # a line cut in the middle
    resumed = small_model(seed=1)  # other weights: all of them come from the checkpoint
    again = fit(resumed, batches, out=tmp_path / "torn", progress=False, **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    rows = [json.loads(x) for x in (tmp_path / "torn" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(small_model(), batches, steps=10, every=10, log_every=5, out=tmp_path, progress=False)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="checkpoint of another model"):
        fit(other, batches, steps=20, every=10, log_every=5, out=tmp_path, progress=False)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 10, "every": 7, "log_every": 5}])
def test_impossible_step_counts_are_refused(bad):
    with pytest.raises(ValueError, match="expected steps >= 1"):
        fit(small_model(), batches, progress=False, **bad)
