"""Tiny random checkpoints of many architectures, built from their configs."""

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

V = 96
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_OLD = {key: SIZE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
_NEOX = {key: SIZE[key] for key in SIZE if key not in ("num_key_value_heads", "head_dim")}
_GPT2 = _OLD | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

LAYER_TYPES = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, dict[str, object]] = {
    "llama": SIZE,
    "mistral": SIZE | {"sliding_window": 64},
    "qwen2": SIZE,
    "qwen3": SIZE,
    "gemma2": SIZE | {"sliding_window": 64},
    "gemma3": SIZE | {"sliding_window": 64, "layer_types": LAYER_TYPES},
    "phi3": SIZE,
    "gpt_neox": _NEOX | {"rotary_pct": 0.25},
    "gpt2": _GPT2,
    "olmo2": SIZE,
    "smollm3": SIZE | {"no_rope_layers": [1, 0]},
    "gpt_oss": SIZE
    | {"sliding_window": 64, "layer_types": LAYER_TYPES}
    | {"num_local_experts": 2, "num_experts_per_tok": 1}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mimo_v2_flash": SIZE  # a sink in the second layer only, and values wider than keys
    | {"sliding_window": 65, "layer_types": LAYER_TYPES[::-1], "mlp_layer_types": ["dense"] * 2}
    | {"v_head_dim": 12, "swa_v_head_dim": 12},
    "opt": _OLD
    | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "gptj": _GPT2 | {"rotary_dim": 4},
}
# Linear attention or a convolution in layers 0 and 2, softmax attention in 1 and 3.
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0}
HYBRIDS: dict[str, dict[str, object]] = {
    "qwen3_next": SIZE
    | _LINEAR
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": SIZE | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
}


def tiny(name: str, *, seed: int = 0, sharpen: float = 4.0, **changes: object) -> PreTrainedModel:
    """A random model in eval mode; `sharpen` scales matrices: attention far from uniform."""
    model_type = {"gemma3": "gemma3_text"}.get(name, name)
    config = AutoConfig.for_model(model_type, **(CONFIGS | HYBRIDS)[name])
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpen)
            elif "sink" in name:
                parameter.normal_(1)
    return model


def tokens(B: int, T: int, *, seed: int = 0) -> torch.Tensor:
    """(B,T) random ids, pads excluded."""
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))
