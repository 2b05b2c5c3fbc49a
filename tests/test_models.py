"""Loading: one path for embedded, local and hub models, and one clear sentence for the rest."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import steerkit
from steerkit.files import DATA


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny):
    """A local directory with random weights and the embedded tokenizer."""
    out = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(vocab_size=4096, hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tiny[1].save_pretrained(out)
    return out


def test_checkpoints_are_below_20_megabytes_together_and_no_pickle_ships():
    files = [*DATA.rglob("*.safetensors")]
    assert files and sum(f.stat().st_size for f in files) <= 20e6
    assert not [p for p in DATA.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]


@pytest.mark.parametrize(
    "text", ["", "naïve 漢字 🙂🙃", "\t\r\n  a", "<|x|> {v}", "".join(map(chr, range(0x250)))]
)
def test_any_text_encodes_without_unknowns_and_decodes_back_exactly(tiny, text):
    ids = tiny[1](text, add_special_tokens=False)["input_ids"]
    assert tiny[1].decode(ids) == text and tiny[1].unk_token_id not in ids


def test_a_local_directory_loads_in_float32_on_a_cpu_unless_another_type_is_named(checkpoint):
    model, tokenizer = steerkit.load(checkpoint, device="cpu")
    assert model.dtype == torch.float32 and not model.training and len(tokenizer) == 4096
    assert steerkit.load(checkpoint, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_checkpoint_without_safetensors_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        steerkit.load(tmp_path)


def test_a_checkpoint_that_wants_to_run_code_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot be"):
        steerkit.load(tmp_path)
