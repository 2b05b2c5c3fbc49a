"""A training loop for runs of hours: AdamW; warm-up, hold, decay; goes on after a kill.

Like the loop of `steerkit.streaming.backcopy.train`, with a decay at the end and with checkpoints.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from steerkit.files import write_text

Batches = Callable[[int], Tensor]
Log = list[dict[str, float]]


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    warmup: int,
    decay: float,
    out: Path,
    every: int = 250,
    log_every: int = 25,
    bf16: bool = False,
) -> Log:
    """Next-token training; returns the log, one entry each `log_every` steps (loss in nats).

    `batches(step)` gives ids (B, T) and must depend on `step` alone: then a run that was killed and
    is started again with the same `out` goes on from its last checkpoint as if nothing had
    happened. `decay` is the last fraction of the steps, over which the learning rate falls linearly
    to zero. `every` (checkpoints) is a multiple of `log_every`: so a kill tears no logged mean.
    """
    if steps < 1 or every % log_every:
        raise ValueError(
            f"steps={steps}, every={every}, log_every={log_every}: expected steps >= 1 and `every` "
            "a multiple of `log_every`"
        )
    out.mkdir(parents=True, exist_ok=True)
    optimizer = _adamw(model, lr)
    start, log = _resume(model, optimizer, out)
    device, losses, since = next(model.parameters()).device, [], time.perf_counter()
    tokens = log[-1]["tokens"] if log else 0
    model.train()
    for step in tqdm(range(start, steps), initial=start, total=steps, mininterval=1.0):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps=steps, warmup=warmup, decay=decay)
        ids = batches(step).to(device)
        losses.append(_step(model, optimizer, ids, bf16=bf16))
        tokens, done = tokens + ids.numel(), step + 1
        if done % log_every == 0 or done == steps:
            log.append(
                {
                    "step": done,
                    "tokens": tokens,
                    "loss": torch.stack(losses).mean().item(),
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - since, 3),
                }
            )
            losses, since = [], time.perf_counter()
        if done % every == 0 or done == steps:
            _checkpoint(model, optimizer, out, done, log)
    model.eval()
    return log


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, *, bf16: bool) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(ids[:, :-1], use_cache=False).logits  # (B, T-1, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def schedule(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate in 0..1: linear warm-up, hold, linear decay at the end."""
    left = (steps - step) / max(1, round(decay * steps))
    return min(1.0, (step + 1) / max(1, warmup), left)


def _adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    # Norm gains and biases are not decayed: pulling them to zero is a different prior.
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, step: int, log: Log
) -> None:
    """One file holds weights, optimizer and log, so that a kill never leaves them out of step."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value
    part = out / "state.part"
    metadata = {"step": str(step), "log": json.dumps(log)}
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, metadata)
    os.replace(part, out / "state.safetensors")


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> tuple[int, Log]:
    """Load the checkpoint in `out`: the steps that it took, and its log."""
    if not (out / "state.safetensors").exists():
        return 0, []
    with safe_open(out / "state.safetensors", "pt") as state:
        metadata = state.metadata()
        tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118
    for name, p in model.named_parameters():
        if getattr(tensors.get(f"model.{name}"), "shape", None) != p.shape:
            raise ValueError(f"{out}: checkpoint of another model ({name} differs); remove it")
        p.data.copy_(tensors[f"model.{name}"])
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
        optimizer.state[p] = {k: tensors[f"{k}.{name}"].to(p.device) for k in keys}
    return int(metadata["step"]), json.loads(metadata["log"])


def write_log(path: Path, log: Log) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in log))
