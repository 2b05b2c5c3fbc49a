"""One training loop for every model of the kit: AdamW; warm-up, hold, decay; resumable."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from steerkit.files import write_text

Batches = Callable[[int], Tensor]


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    warmup: int = 100,
    decay: float = 0.2,
    clip: float = 1.0,
    out: Path | None = None,
    every: int = 500,
    log_every: int = 50,
    callback: Callable[[int, nn.Module], None] | None = None,
    bf16: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Next-token training; returns the log, one row each `log_every` steps (loss in nats).

    `batches(step)` gives ids (B, T) and must depend on `step` alone: then a run that was killed and
    is started again with the same `out` continues from its last checkpoint as if nothing had
    happened. `decay` is the last fraction of the steps, over which the learning rate falls linearly
    to zero. `callback(step, model)` sees the model after each step. `every` (checkpoints) is a
    multiple of `log_every`, so that no logged mean is torn by a kill.
    """
    if steps < 1 or every % log_every:
        raise ValueError(
            f"steps={steps}, every={every}, log_every={log_every}: expected steps >= 1 and `every` "
            "a multiple of `log_every`"
        )
    optimizer = _adamw(model, lr, weight_decay)
    start, log = _resume(model, optimizer, out)
    device, losses, since = next(model.parameters()).device, [], time.perf_counter()
    tokens = log[-1]["tokens"] if log else 0
    model.train()
    shown = range(start, steps)
    for step in tqdm(shown, initial=start, total=steps, mininterval=1.0, disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps=steps, warmup=warmup, decay=decay)
        ids = batches(step).to(device)
        losses.append(_step(model, optimizer, ids, clip=clip, bf16=bf16))
        tokens, done = tokens + ids.numel(), step + 1
        if done % log_every == 0 or done == steps:
            row = {"step": done, "tokens": tokens, "loss": torch.stack(losses).mean().item()}
            seconds = round(time.perf_counter() - since, 3)
            log.append({**row, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds})
            losses, since = [], time.perf_counter()
            _append(out, log[-1])
        if out is not None and (done % every == 0 or done == steps):
            _checkpoint(model, optimizer, out, done)
        if callback is not None:
            callback(done, model)
    model.eval()
    return log


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, *, clip: float, bf16: bool
) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = next_token_loss(model, ids)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def schedule(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate in 0..1: linear warm-up, hold, linear decay at the end."""
    left = (steps - step) / max(1, round(decay * steps))
    return min(1.0, (step + 1) / max(1, warmup), left)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of ids[:, 1:]; ids (B, T)."""
    logits = model(ids[:, :-1], use_cache=False).logits  # (B, T-1, V)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    # Norm gains and biases are not decayed: pulling them to zero is a different prior.
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, step: int) -> None:
    """One file holds weights and optimizer, so that a kill can never leave them out of step."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value
    part = out / "state.part"
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, {"step": str(step)})
    os.replace(part, out / "state.safetensors")


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, out: Path | None
) -> tuple[int, list[dict[str, float]]]:
    if out is None:
        return 0, []
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "state.safetensors").exists():
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0, []
    with safe_open(out / "state.safetensors", "pt") as state:
        step, held = int(state.metadata()["step"]), {k: state.get_tensor(k) for k in state.keys()}  # noqa: SIM118
    for name, p in model.named_parameters():
        if getattr(held.get(f"model.{name}"), "shape", None) != p.shape:
            raise ValueError(f"{out}: checkpoint of another model ({name} differs); remove it")
        p.data.copy_(held[f"model.{name}"])
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in held]
        optimizer.state[p] = {k: held[f"{k}.{name}"].to(p.device) for k in keys}
    lines = (out / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn
    rows = [row for row in rows if row["step"] <= step]
    write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return step, rows


def _append(out: Path | None, row: dict[str, float]) -> None:
    if out is not None:
        with (out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
