"""GAtt's training through TRL: SFT and DPO, LoRA by PEFT, resumable, one process or several."""

import html
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer import Trainer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from steerkit.chat import check_template
from steerkit.files import DATA, write_json
from steerkit.gatt.dialogues import Row
from steerkit.progress import progress

IGNORED = -100  # the label of a token without loss


@dataclass(frozen=True)
class Settings:
    """How to train. `rank` is LoRA's (0 trains all weights); `batch` counts rows of one process.

    `warmup` is in steps, then the learning rate falls linearly to zero; `save_every` in steps; the
    two last fields are DPO's: its beta, and the weight of the ordinary loss on the chosen reply,
    which keeps its probability from sinking with the rejected one's.
    """

    lr: float = 4e-3
    steps: int = 200
    batch: int = 8
    warmup: int = 10
    rank: int = 12
    max_length: int | None = None
    save_every: int = 20
    seed: int = 0
    beta: float = 0.1
    sft_weight: float = 0.5


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of `datasets` for a few hundred rows, no warnings of one library about another."""
    shown, level = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    out: Path,
    settings: Settings = Settings(),  # noqa: B008
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train on GAtt rows (`make_rows`), on all assistant turns (`make_all_turns_rows`), or on DPO
    pairs (`make_pairs`), told apart by their keys; returns the model and the log (loss in nats).

    `model` is trained in place; LoRA's weights are merged into it, and `out` receives them (or all
    weights). Checkpoints go to `out` too: a run that was killed and is started again ends with the
    same loss. Raises ValueError for an SFT row longer than `max_length` or than the model's
    positions, and for an `out` of another model or of other settings.

    Works under `accelerate launch`. Two processes without a GPU are `ACCELERATE_USE_CPU=true
    accelerate launch --multi_gpu --num_processes 2`: with `--cpu` it starts one.
    """
    check_template(tokenizer)
    _claim(out, model=model, settings=settings, rows=rows)
    trainer = make_trainer(model, tokenizer, rows, out=out, settings=settings)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with _quiet(), progress(settings.steps, unit="steps") as update:
        trainer.add_callback(_Steps(update))
        trainer.train(resume_from_checkpoint=_last_checkpoint(out))
        trainer.save_model(str(out))
        _name_base(out, base_name(model))
    log = [row for row in trainer.state.log_history if "loss" in row]
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    return trained.eval(), log


@_quiet()
def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    out: Path,
    settings: Settings,
) -> Trainer:
    """TRL's trainer for these rows, its tokenised rows checked: none truncated, none dropped."""
    if not rows:
        raise ValueError("no rows to train on: did every sampled reply fail its verifier?")
    keys = rows[0].keys()
    cuda = model.device.type == "cuda"
    common: dict[str, Any] = {
        "output_dir": str(out),
        "learning_rate": settings.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_steps": _log_every(settings),
        "seed": settings.seed,
        "max_length": None,  # TRL cuts the end off, which is the reply: we check instead
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": model.device.type == "cpu",
        "train_sampling_strategy": _strategy(pairs="rejected" in keys),
        "gradient_checkpointing": cuda,
        "dataloader_pin_memory": cuda,
        "report_to": "none",
    }
    lora = _lora(settings) if settings.rank else None
    data = datasets.Dataset.from_list(list(rows))
    if "rejected" in keys:
        loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings.sft_weight]}
        config = DPOConfig(**common, **loss, beta=settings.beta)
        return DPOTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
    config = SFTConfig(**common, assistant_only_loss="messages" in keys)
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    check_rows(trainer.train_dataset, rows, _limit(model, settings))
    return trainer


def _name_base(out: Path, name: str) -> None:
    """Let the saved adapter name its base in a way that holds on another machine."""
    path = out / "adapter_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        write_json(path, config | {"base_model_name_or_path": name})


def _strategy(*, pairs: bool) -> str:
    """Rows of one length together, which halves the padding; not for DPO's pairs, which have no
    length of their own, nor in several processes, whose generators would not agree on the order."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "group_by_length" if alone and not pairs else "random"


def _log_every(settings: Settings) -> int:
    """About ten rows, and a divisor of `save_every`, so that no logged mean is torn by a kill."""
    most = max(1, min(settings.steps // 10, settings.save_every))
    return next(d for d in range(most, 0, -1) if settings.save_every % d == 0)


def _lora(settings: Settings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _limit(model: PreTrainedModel, settings: Settings) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    return min(settings.max_length or positions, positions)


def check_rows(tokenised: Sequence[dict[str, list[int]]], rows: Sequence[Row], limit: int) -> None:
    """ValueError unless each row is there, whole, and has a supervised token at its end."""
    if len(tokenised) != len(rows):
        raise ValueError(f"{len(rows) - len(tokenised)} of {len(rows)} rows were dropped by TRL")
    for i, row in enumerate(tokenised):
        T = len(row["input_ids"])
        if limit < T:
            reply = sum(label != IGNORED for label in row["labels"])
            raise ValueError(
                f"row {i} has {T} tokens ({reply} of them the reply), max_length is {limit}: "
                "the end would be cut off, and that is the reply; sample fewer turns, or raise it"
            )
        if all(label == IGNORED for label in row["labels"]):
            raise ValueError(f"row {i} carries no loss: is its last reply empty?")


def _claim(out: Path, *, model: PreTrainedModel, settings: Settings, rows: Sequence[Row]) -> None:
    """Mark `out` as this run's; ValueError when it is another's."""
    shape = {k: list(p.shape) for k, p in model.named_parameters() if "lora_" not in k}
    first = next(p for p in model.parameters()).detach().float()
    mine = {
        "model": base_name(model),
        "weights": f"{sum(map(len, shape.values()))} {first.double().norm().item():.6f}",
        "rows": len(rows),
        "settings": asdict(settings),
    }
    path = out / "run.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if held is None:
        write_json(path, mine)
    elif held != mine:
        differs = [k for k in mine if held.get(k) != mine[k]]
        raise ValueError(
            f"{out}: training of another run ({', '.join(differs)} differ: "
            f"{held.get(differs[0])} there, {mine[differs[0]]} here); remove it or choose another"
        )


def base_name(model: PreTrainedModel) -> str:
    """How `models.load` finds this model again: an embedded model's name, a directory, a hub id."""
    path = Path(model.config.name_or_path)
    return path.name if path.parent == DATA else str(model.config.name_or_path)


def _last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint: `trainer_state.json` is written last."""
    found = {int(p.name.split("-")[1]): p for p in out.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        if (found[step] / "trainer_state.json").exists():
            return str(found[step])
        shutil.rmtree(found[step])
    return None


class _Steps(TrainerCallback):
    """Tells `update` of each step, in the first process only."""

    def __init__(self, update: Callable[[int], None]) -> None:
        self.update = update

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.update(state.global_step)  # of a run that goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.update(1)


def mask_html(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    """A tokenised row to look at: tokens that carry loss on a dark ground and underlined."""
    cells = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        text = html.escape(tokenizer.decode([token])).replace(" ", "&nbsp;")
        kept = "background:#0072B2;color:white;text-decoration:underline"
        style = "background:#eeeeee;color:#333333" if label == IGNORED else kept
        cells.append(f'<span style="{style};padding:1px;margin:1px">{text}</span>')
    return f'<div style="font-family:monospace;line-height:1.9">{"".join(cells)}</div>'
