"""Which architectures work, and how exactly: builds each one small and random, compares, writes.

    python docs/support.py                  all of them, docs/support.md (some minutes)
    python docs/support.py llama gpt_oss    these, printed

The references are transformers' own eager attention, run on whole sequences without a cache:
weights are read there, and multiplied there (equation 2 of 2311.02262). For streams each step runs
the kept tokens anew, at the positions 0, 1, 2, ..., with the inputs of their attention put back.
Nothing in the checks knows an architecture.

Axes: B batch, L layers, H heads, T tokens, V vocabulary.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.attention.heads import Head
from steerkit.attention.hook import softmax_layers_only
from steerkit.attention.maps import attention_map, bin_edges
from steerkit.attention.record import attention_weights
from steerkit.files import write_text
from steerkit.steering.head_search import score_heads
from steerkit.steering.pasta import emphasise
from steerkit.steering.scoring import Prompt
from steerkit.streaming.losses import token_losses
from steerkit.streaming.sink_cache import SinkCache, visible

PAGE = Path(__file__).with_name("support.md")
V, T, ALPHA, SINKS, WINDOW, NEW = 96, 40, 0.05, 3, 12, 8
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALLER = {  # where an architecture has such a thing at all
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 64,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 128}
ROPE = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0},
    "dynamic": {"factor": 4.0},
}


def rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": YARN | ROPE.get(kind, {}) | {"rope_type": kind}}


# Row of the table -> model type of transformers, what its configuration gets besides SIZE.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama 3 (RoPE llama3)": ("llama", rope("llama3")),
    "Llama (yarn)": ("llama", rope("yarn")),
    "Llama (dynamic RoPE)": ("llama", rope("dynamic")),
    "Llama 4 (chunked)": ("llama4_text", {"attention_chunk_size": 16, "no_rope_layers": [1, 0]}),
    "Mistral (sliding window)": ("mistral", {}),
    "Mixtral": ("mixtral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2 (sliding window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2 (soft-capped scores)": ("gemma2", {}),
    "Gemma 3": ("gemma3_text", {}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "Phi-3 (longrope)": ("phi3", rope("longrope")),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "OPT": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "BLOOM (ALiBi)": ("bloom", {}),
    "Falcon": ("falcon", {}),
    "MPT (ALiBi)": ("mpt", {}),
    "StableLM": ("stablelm", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "GLM": ("glm", {}),
    "GLM-4": ("glm4", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {}),
    "Granite": ("granite", {}),
    "SmolLM3 (NoPE layers)": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Nemotron": ("nemotron", {}),
    "StarCoder2": ("starcoder2", {}),
    "Helium": ("helium", {}),
    "DeepSeek-V2 (MLA)": ("deepseek_v2", {"num_key_value_heads": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3 (MLA)": ("deepseek_v3", {"num_key_value_heads": 4, "head_dim": 4}),
    "DiffLlama": ("diffllama", {}),
    "gpt-oss (learned sinks, yarn)": ("gpt_oss", {}),
    "Granite-SWA (learned sinks)": ("granite_swa", {}),
    "GraniteMoE-SWA (learned sinks)": ("granitemoe_swa", {}),
    "MiMo-V2-Flash (learned sinks)": ("mimo_v2_flash", {"mlp_layer_types": ["dense"] * 2}),
    "HY-V4 (learned sinks, sparse)": ("hy_v4", {}),
    "Flint (learned sinks)": ("flint", {}),
    "DeepSeek-V4 (learned sinks)": ("deepseek_v4", {}),
    "Qwen3-Next (hybrid)": ("qwen3_next", {}),
    "LFM2 (hybrid)": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Jamba (hybrid)": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "Falcon-H1 (hybrid)": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "Mamba": ("mamba", {}),
    "BERT (bidirectional)": ("bert", {}),
    "T5": ("t5", {"d_kv": 8, "d_ff": 48}),
    "BART": ("bart", {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}),
}


def build(model_type: str, changes: Mapping[str, Any]) -> PreTrainedModel:
    """A random model with two layers, of two kinds if the architecture has them."""
    default = AutoConfig.for_model(model_type)
    size = SIZE | {key: value for key, value in SMALLER.items() if getattr(default, key, None)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1:
        size |= {"layer_types": kinds[:2]}
    derived = [key for key in size if isinstance(getattr(type(default), key, None), property)]
    for key in derived:
        del size[key]
    config = AutoConfig.for_model(model_type, **size | dict(changes))
    for name in ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        if classes := getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING").get(type(config), None):
            break
    torch.manual_seed(0)
    model = classes._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # attention far from uniform
            elif "sink" in name:
                parameter.normal_()
    return model


# References

Chosen = dict[int, list[int]]  # layer -> heads


class Eager:
    """transformers' eager attention, without steerkit: `weights` by layer, `heads` reweighted."""

    def __init__(self, heads: Chosen | None = None, factor: Tensor | None = None) -> None:
        self.heads, self.factor = heads or {}, factor  # factor (B, keys), later keys 1
        self.weights: dict[int, Tensor] = {}
        self.modules: dict[nn.Module, int] = {}

    def attention(self, eager: Callable, module: nn.Module, *args: Any, **options: Any) -> tuple:
        query, key, value, *mask = args
        # What it does to one-hot values; what it returns as weights may leave a sink out.
        one_hot = torch.eye(key.shape[2]).expand(*value.shape[:3], -1)
        weights = eager(module, query, key, one_hot, *mask, **options)[0].transpose(1, 2)
        number = getattr(module, "layer_idx", None)
        layer = self.modules.setdefault(module, len(self.modules) if number is None else number)
        self.weights[layer] = weights
        if layer not in self.heads:
            return eager(module, *args, **options)
        sink = 1 - weights.sum(-1, keepdim=True) if options.get("s_aux") is not None else 0
        weights = weights.contiguous()
        held = torch.ones(len(query), 1, 1, key.shape[2])
        held[:, 0, 0, : self.factor.shape[1]] = self.factor[:, : key.shape[2]]
        weights[:, self.heads[layer]] *= held
        weights = weights / (weights.sum(-1, keepdim=True) + sink)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ value).transpose(1, 2), weights

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator["Eager"]:
        name, before = "eager_attention_forward", model.config._attn_implementation
        files: set[ModuleType] = {sys.modules[type(m).__module__] for m in model.modules()}
        originals = {file: getattr(file, name) for file in files if hasattr(file, name)}
        model.set_attn_implementation("eager")
        try:
            for file, eager in originals.items():
                setattr(file, name, lambda *a, eager=eager, **o: self.attention(eager, *a, **o))
            yield self
        finally:
            for file, eager in originals.items():
                setattr(file, name, eager)
            model.set_attn_implementation(before)


def stream_logits(model: PreTrainedModel, ids: Tensor, new: int = 0) -> tuple[Tensor, list[int]]:
    """Logits (T,V) of a stream with sinks and a window, one token at a time, and greedy tokens."""
    with Eager().on(model) as eager:
        model(ids[:1, :1])
    inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in eager.modules}
    kept: list[int] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        stored = inputs[module]
        stored.append(hidden[:, -1])
        hidden = torch.stack([stored[t] for t in kept], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    tokens, logits, t = ids[0].tolist(), [], 0
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in inputs]
    with Eager().on(model):
        while t < len(tokens):
            kept[:] = visible(t, SINKS, WINDOW)
            row = torch.tensor([[tokens[i] for i in kept]])
            logits.append(model(row, use_cache=False).logits[0, -1])
            t += 1
            if ids.shape[1] <= t < ids.shape[1] + new:
                tokens.append(int(logits[-1].argmax()))
    for hook in hooks:
        hook.remove()
    return torch.stack(logits), tokens[ids.shape[1] :]


# Checks: each returns the largest difference from its reference


def random_ids(B: int, length: int) -> Tensor:
    return torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(0))


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def maps(model: PreTrainedModel, _: Chosen) -> float:
    ids = random_ids(1, T)
    ours, cells = attention_weights(model, ids), attention_map(model, ids, bins=8)
    with Eager().on(model) as eager:
        model(ids)
    layers = sorted(eager.weights)
    wanted = torch.stack([eager.weights[layer][0] for layer in layers])
    edges, most = bin_edges(T, 8), wanted.amax((0, 1))
    bins = [slice(a, b) for a, b in pairwise(edges)]
    by_hand = torch.tensor([[most[row, column].max() for column in bins] for row in bins])
    return max(gap(ours[layers], wanted), gap(cells, by_hand))


def steering(model: PreTrainedModel, heads: Chosen) -> float:
    ids = random_ids(2, T)
    real, spans = torch.ones_like(ids), [[(8, 16)], [(20, 24), (30, 31)]]
    real[0, :5] = 0
    factor = torch.full(ids.shape, ALPHA)
    for row, each in zip(factor, spans, strict=True):
        for start, end in each:
            row[start:end] = 1
    chosen = [Head(layer, index) for layer in heads for index in heads[layer]]
    new = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    new |= {"output_logits": True, "return_dict_in_generate": True}
    with emphasise(model, spans, chosen, alpha=ALPHA):
        prefill = model(ids, attention_mask=real).logits
    with Eager(heads, factor).on(model):
        error = gap(prefill[real == 1], model(ids, attention_mask=real).logits[real == 1])
    if not model.can_generate():
        return error
    with emphasise(model, spans, chosen, alpha=ALPHA):
        out = model.generate(ids, attention_mask=real, **new)
    longer = torch.cat([real, torch.ones(2, NEW, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(1) - 1).clamp(min=0)
    with Eager(heads, factor).on(model):
        whole = model(out.sequences, attention_mask=longer, position_ids=positions).logits
    return max(error, gap(torch.stack(out.logits, dim=1), whole[:, T - 1 : -1]))


def losses(model: PreTrainedModel, _: Chosen) -> float:
    ids = random_ids(1, T)
    ours = token_losses(model, ids, sinks=SINKS, window=WINDOW, block=16)
    logits, _ = stream_logits(model, ids[:, :-1])
    return gap(ours[0], nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))


def generating(model: PreTrainedModel, _: Chosen) -> float:
    ids, cache = random_ids(1, T), SinkCache(model, sinks=SINKS, window=WINDOW)
    new = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    new |= {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, past_key_values=cache, **new)
    logits, tokens = stream_logits(model, ids, new=NEW)
    same = out.sequences[0, T:].tolist() == tokens
    return gap(torch.cat(out.logits), logits[T - 1 : -1]) if same else math.inf


def head_scores(model: PreTrainedModel, heads: Chosen) -> float:
    ids, answer = random_ids(1, T)[0].tolist(), [5, 7]
    prompt = Prompt(ids[:-2], [(8, 16)], answer)
    chosen = [Head(layer, index) for layer in heads for index in heads[layer]]
    found = score_heads(model, [prompt], heads=chosen, alpha=ALPHA).scores[0]
    factor = torch.full((1, T), ALPHA)
    factor[:, 8:16] = factor[:, T - 2 :] = 1
    whole = torch.tensor([prompt.ids + answer])
    wanted = []
    for layer, index in chosen:
        with Eager({layer: [index]}, factor).on(model):
            log = model(whole).logits[0, T - 3 : -1].log_softmax(-1)
        wanted.append(log.gather(-1, torch.tensor(answer)[:, None]).mean())
    return gap(torch.stack([found[head] for head in chosen]), torch.stack(wanted))


CHECKS: dict[str, Callable[[PreTrainedModel, Chosen], float]] = {
    "weights, maps": maps,
    "`emphasise`": steering,
    "`score_heads`": head_scores,
    "`token_losses`": losses,
    "`SinkCache`": generating,
}
LIMIT = 2e-5


@torch.no_grad()
def cells(name: str, *, hybrid: bool = False) -> list[tuple[str, str]]:
    """(yes or no, difference or reason) for each check of one row of MODELS."""
    model, row = build(*MODELS[name]), []
    for check in CHECKS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with softmax_layers_only(model) if hybrid else nullcontext([0, 1]) as layers:
                    difference = check(model, {layer: [1, 2] for layer in layers[-2:]})
                row.append(("yes" if difference <= LIMIT else "WRONG", f"{difference:.0e}"))
            except ValueError as error:
                row.append(("no", " ".join(str(error).split())))
    return row


def table(names: list[str]) -> str:
    """The page's table, and the reasons of what is refused below it."""
    lines = ["| model | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    reasons: dict[str, int] = {}
    rows = [(name, False) for name in names]
    rows += [(name, True) for name in names if "hybrid" in name]
    for name, hybrid in sorted(rows, key=lambda row: [*MODELS].index(row[0])):
        found = cells(name, hybrid=hybrid)
        row = []
        for answer, more in found:
            if answer == "no":
                reason = re.sub(r"^(\w+For\w+|layer \d+):? ", "", more)
                more = reasons.setdefault(reason, len(reasons) + 1)
            row.append(f"{answer} ({more})" if answer != "no" else f"no [{more}]")
        title = f"{name}, `softmax_layers_only`" if hybrid else name
        lines.append(f"| {title} | " + " | ".join(row) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join([*lines, "", *(f"{n}. {reason}" for reason, n in reasons.items())])


INTRODUCTION = """# Which architectures work

Written by `python docs/support.py`, which builds each architecture small and random, in float32 on
a CPU, and compares with transformers' own eager attention. "yes" gives the largest difference, of a
weight, a logit or a loss; "no" the number of the sentence with which it is refused. In a hybrid
only some layers have softmax attention; `softmax_layers_only` (steerkit/attention/hook.py) acts on
those.

"""


if __name__ == "__main__":
    if names := sys.argv[1:]:
        print(table([name for name in MODELS if MODELS[name][0] in names]))
    else:
        write_text(PAGE, INTRODUCTION + table(list(MODELS)) + "\n")
