"""GAtt's training through TRL: SFT and DPO, LoRA by PEFT, on one process or several."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers.trainer import Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from steerkit.chat import check_template
from steerkit.gatt.dialogues import Row
from steerkit.models import Model, Tokenizer


@dataclass(frozen=True)
class Settings:
    """How to train. `rank` is LoRA's (0 trains all weights); `batch` counts rows of one process.

    `warmup` is in steps, then the learning rate falls linearly to zero. `save_every` is in steps.
    The last two fields are DPO's: its beta, and the weight of the ordinary loss on the chosen
    reply, which keeps its probability from sinking with the rejected one's.
    """

    lr: float = 4e-3
    steps: int = 200
    batch: int = 8
    warmup: int = 10
    rank: int = 12
    save_every: int = 20
    seed: int = 0
    beta: float = 0.1
    sft_weight: float = 0.5


def train(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    out: Path,
    settings: Settings = Settings(),  # noqa: B008
    resume: bool = False,
) -> tuple[Model, list[dict[str, float]]]:
    """Train on rows; returns the trained model and the log (loss in nats per token).

    The rows' keys decide how: "prompt" and "completion" (GAtt's, by `make_rows`) put the loss on
    the last reply, "messages" on every assistant turn; "prompt", "chosen" and "rejected" are DPO's.

    `model` is trained in place. LoRA's weights are merged into it, and saved to `out`; from then on
    `out` is the model's name, as after `load(out)`. Checkpoints go to `out` too; `resume` goes on
    from the newest one, as TRL does, with the same model, rows and settings.
    Raises ValueError for an `out` that holds a training unless `resume`, for a `resume` with
    another base, and for an SFT row longer than the model's positions.

    Works under `accelerate launch`. Two processes without a GPU are `ACCELERATE_USE_CPU=true
    accelerate launch --multi_gpu --num_processes 2`: with `--cpu` it starts one.

    >>> import steerkit, tempfile
    >>> from steerkit.gatt.training import Settings
    >>> model, tokenizer = steerkit.load("tiny", device="cpu")
    >>> prompt = [{"role": "user", "content": "Hobby: chess. Where does Anna Adler live?"}]
    >>> reply = [{"role": "assistant", "content": "Anna Adler lives in Lisbon. I love chess."}]
    >>> rows, out = [{"prompt": prompt, "completion": reply}], tempfile.mkdtemp()
    >>> model, log = steerkit.train(model, tokenizer, rows, out=out, settings=Settings(steps=1))
    {'loss': ...
    >>> log[0]["loss"] < 0.1  # nats per token of the reply: the base knows this one
    True
    """
    check_template(tokenizer)
    checkpoint = get_last_checkpoint(out) if Path(out).is_dir() else None
    if checkpoint is not None and not resume:
        raise ValueError(f"{checkpoint} is there already: go on with resume=True, or elsewhere")
    if checkpoint is not None and settings.rank:
        base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
        if (base or "") != model.name_or_path:
            raise ValueError(
                f"{checkpoint} is an adapter of {base!r}, and the model is {model.name_or_path!r}: "
                "resume with the model that the training began with, loaded anew"
            )
    trainer = make_trainer(model, tokenizer, rows, out=out, settings=settings)
    with _quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    trained.name_or_path = trained.config.name_or_path = str(out)
    return trained.eval(), log


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of `datasets` for a few hundred rows, no warnings of one library about another."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@_quiet()
def make_trainer(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Row], *, out: Path, settings: Settings
) -> Trainer:
    """TRL's trainer for these rows, which it has tokenised: `train_dataset` shows the labels."""
    if not rows:
        raise ValueError("no rows to train on: did every sampled reply fail its verifier?")
    pairs, cuda = "rejected" in rows[0], model.device.type == "cuda"
    # Rows of one length together halve the padding. Not for pairs, which have no length of their
    # own, nor in several processes, whose generators would not agree on the order.
    grouped = not pairs and int(os.environ.get("WORLD_SIZE", "1")) == 1
    common: dict[str, Any] = {
        "output_dir": str(out),
        "learning_rate": settings.lr,
        "warmup_steps": settings.warmup,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_steps": max(1, settings.steps // 10),
        "seed": settings.seed,
        "max_length": None,  # TRL would cut the end off, which is the reply
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": model.device.type == "cpu",
        "train_sampling_strategy": "group_by_length" if grouped else "random",
        "gradient_checkpointing": cuda,
        "dataloader_pin_memory": cuda,
    }
    rank, where = settings.rank, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, **where) if rank else None
    options = {
        "train_dataset": datasets.Dataset.from_list(list(rows)),
        "processing_class": tokenizer,
        "peft_config": lora,
    }
    if pairs:
        loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings.sft_weight]}
        return DPOTrainer(model, args=DPOConfig(**common, **loss, beta=settings.beta), **options)
    config = SFTConfig(**common, assistant_only_loss="messages" in rows[0])
    trainer = SFTTrainer(model, args=config, **options)
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    if longest > positions:
        raise ValueError(f"a row has {longest} tokens, the model {positions}: sample fewer turns")
    return trainer
