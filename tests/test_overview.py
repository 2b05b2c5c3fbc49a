import json
import shutil

from steerkit.files import ROOT
from steerkit.lab import overview


def test_the_stored_results_of_four_notebooks_become_one_picture(tmp_path):
    stored = ROOT / "figures" / "cpu"
    for name in ("01_gatt_training", "02_attention_heatmaps", "03_pasta_head_search"):
        shutil.copytree(stored / name, tmp_path / name)
    assert overview.draw(tmp_path) is None, "a result was missing"
    assert not (tmp_path / "overview.png").exists()

    shutil.copytree(stored / "04_streaming_llm", tmp_path / "04_streaming_llm")
    picture = overview.draw(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(picture.with_suffix(".json").read_text())["alt"]


def test_the_committed_picture_is_drawn_from_the_committed_results(tmp_path):
    stored = ROOT / "figures" / "cpu"
    shutil.copytree(stored, tmp_path / "cpu")
    new = overview.draw(tmp_path / "cpu").with_suffix(".json")
    assert new.read_text() == (stored / "overview.json").read_text()
