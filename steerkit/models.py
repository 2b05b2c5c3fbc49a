"""Load a model: the embedded ones, a hub id, or a local directory; one path for all."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from steerkit.files import DATA


def load(
    name: str | os.PathLike = "tiny", *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode, and its tokenizer.

    `name` is an embedded model ("tiny", "tiny-stream", "tiny-gatt"), a local directory, or a hub
    id. A directory with an adapter (PEFT's `adapter_config.json`) gives its base with the adapter
    merged into the weights. `device` "auto" is CUDA when present; `dtype` "auto" is the
    checkpoint's own on CUDA, float32 on a CPU.
    Raises ValueError in one line for what cannot be loaded; never runs code from a checkpoint, and
    reads safetensors only.
    """
    place, source = resolve_device(device), _source(name)
    if (Path(source) / "adapter_config.json").exists():
        return _with_adapter(name, Path(source), device=device, dtype=dtype)
    quiet = sum(f.stat().st_size for f in Path(source).glob("*.safetensors")) in range(1, 10**8)
    if dtype == "auto" and place.type == "cpu":
        dtype = torch.float32
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with _no_bar() if quiet else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_explain(name, source, error)) from error
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{name}: {type(model).__name__} does not support transformers' AttentionInterface; "
            "take a Llama, Mistral, Qwen, Gemma, Phi or GPT-NeoX checkpoint"
        )
    return model.to(place).eval(), tokenizer


def _with_adapter(
    name: str | os.PathLike, folder: Path, *, device: str, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base that the adapter names (embedded, a directory or a hub id), merged with it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{name}: an adapter needs peft: `pip install -e .[gatt]`") from error
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        model, tokenizer = load(base["base_model_name_or_path"], device=device, dtype=dtype)
        with warnings.catch_warnings():  # of peft's about names of transformers that will change
            warnings.simplefilter("ignore", FutureWarning)
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{name}: the adapter cannot be put on its base model ({first}); was it trained on it?"
        ) from error
    return merged.eval(), tokenizer


def config_of(name: str | os.PathLike) -> PretrainedConfig:
    """The shape of a model that `load` would load, without its weights."""
    source = _source(name)
    adapter = Path(source) / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))
        return config_of(base["base_model_name_or_path"])
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_explain(name, source, error)) from error


@contextmanager
def _no_bar() -> Iterator[None]:
    """No progress bar for a checkpoint that loads in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """ "auto" or a torch device string; ValueError when the device is absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device="{device}": expected "auto", "cpu", "cuda" or "cuda:N"'
        ) from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f'device="{device}": {torch.cuda.device_count()} CUDA devices here; use "auto" or "cpu"'
        )
    return place


def embedded() -> list[str]:
    """Names of the models that ship in data/."""
    return sorted(p.parent.name for p in DATA.glob("*/config.json"))


def adapters() -> list[str]:
    """Names of the adapters that ship in data/."""
    return sorted(p.parent.name for p in DATA.glob("*/adapter_config.json"))


def _source(name: str | os.PathLike) -> str:
    """A directory to read, or a hub id; empty and missing directories end here."""
    if str(name) in [*embedded(), *adapters()]:
        return str(DATA / str(name))
    path = Path(name)
    if path.is_dir():
        _check_directory(path)
    elif path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{name}: no such directory; give a checkpoint's directory or a hub id")
    elif "/" not in str(name) and str(name).startswith("tiny"):
        known = ", ".join([*embedded(), *adapters()])
        raise ValueError(f"{name}: no such embedded model; there are {known}")
    return str(name)


def _check_directory(path: Path) -> None:
    if not any((path / f).exists() for f in ("config.json", "adapter_config.json")):
        raise ValueError(f"{path}: no config.json in it; is this a checkpoint's directory?")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(
            p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        )
        held = f"only pickles ({pickles[0]}), which can run code" if pickles else "no weights"
        raise ValueError(
            f"{path}: {held}; steerkit reads model.safetensors: convert the checkpoint"
        )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f'dtype="{name}": expected "auto", "float32", "bfloat16" or "float16"')
    return dtype


def _explain(name: str | os.PathLike, source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        try:
            AutoConfig.from_pretrained(source)
        except (OSError, ValueError, KeyError):
            return f"{name}: its config.json cannot be read ({first})"
        return f"{name}: the checkpoint cannot be loaded ({first})"
    known = ", ".join(embedded())
    return (
        f"{name}: not an embedded model ({known}), not a directory, and the hub gave nothing "
        f"({first}); check the spelling, or the network"
    )
