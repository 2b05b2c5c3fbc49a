"""Load a model: an embedded one, a local directory or a hub id, all in one way."""

import os
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from steerkit.files import DATA, embedded, read_json, source_of


def load(
    name: str | os.PathLike = "tiny", *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Model, Tokenizer]:
    """Model in eval mode, and its tokenizer.

    `name` is an embedded model ("tiny", "tiny-stream", "tiny-gatt", "tiny-gatt-mixed"), a local
    directory, or a hub id. A directory with an adapter (PEFT's `adapter_config.json`) gives its
    base with the adapter merged into the weights. `device` "auto" is CUDA when present; `dtype`
    "auto" is the checkpoint's own on CUDA, float32 on a CPU.
    Raises ValueError in one line for what cannot be loaded; never runs code from a checkpoint, and
    reads safetensors only.

    >>> from steerkit import load
    >>> model, tokenizer = load("tiny")
    >>> model.config.num_hidden_layers, len(tokenizer)
    (6, 4096)
    """
    source = source_of(name)
    adapter = Path(source) / "adapter_config.json"
    try:
        place = resolve_device(device)
        if dtype == "auto" and place.type == "cpu":
            dtype = torch.float32
        if adapter.exists():
            if not adapter.with_name("adapter_model.safetensors").exists():
                raise ValueError("no adapter_model.safetensors; other formats can run code")
            base = read_json(adapter)["base_model_name_or_path"]
            model, tokenizer = load(base, device=device, dtype=dtype)
            return _merged(model, source), tokenizer
        with ExitStack() as after:
            # An embedded model loads in a moment: no progress bar.
            if Path(source).parent == DATA and logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                after.callback(logging.enable_progress_bar)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # many kinds: a damaged file, an unknown dtype, no such device
        reason = " ".join(str(error).split())[:240] or repr(error)
        raise ValueError(
            f'{name}, device="{device}": cannot be loaded ({reason}); a name is a directory with '
            f"config.json and model.safetensors, a hub id, or one of {', '.join(embedded())}"
        ) from error
    return model.to(place).eval(), tokenizer


def resolve_device(device: str) -> torch.device:
    """ "auto" or a torch device string; torch's error when there is no such device here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(0, device=device).device


def _merged(model: Model, adapter: str) -> Model:
    """The base model with the adapter in this folder merged into its weights."""
    from peft import PeftModel

    # Peft uses names of transformers that will change.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    merged.name_or_path = merged.config.name_or_path = adapter  # another model than its base
    return merged
