"""Results on disk: atomic, readable, complete."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from steerkit import files, results, statistics
from steerkit.steering.head_search import load_table

PAPER = json.loads((files.ROOT / "data" / "paper_results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", PAPER)
def test_each_paper_number_names_its_paper_place_and_unit(key):
    row = PAPER[key]
    assert row.keys() in ({"paper", "where", "unit", "what", kind} for kind in ("value", "values"))
    assert re.search(r"\(arXiv \d{4}\.\d{5}\)$", row["paper"])
    assert row["where"] and row["unit"] and row["what"]
    numbers = row["values"].values() if "values" in row else [row["value"]]
    assert row["unit"] == "text" or all(isinstance(x, (int, float)) and x >= 0 for x in numbers)


@pytest.mark.parametrize("read", [lambda p: results.read_claims([p.parent]), load_table])
def test_a_damaged_file_is_named(tmp_path, read):
    path = tmp_path / "half.claim.json"
    path.write_text('{"scores": [[1.0, ')
    with pytest.raises(ValueError, match=r"half.claim.json is no JSON, or damaged .*: make") as e:
        read(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "column", "value"),
    [
        ("streaming.table1.window", None, 5158.07),
        ("streaming.table2.llama2_7b", "0", 3359.95),
        ("streaming.table3.zero_sink", "0+1024", 29214),
        ("streaming.table6.llama2_7b", "4+2044", 9.08),
        ("sink_metric.mistral_7b", None, 97.49),
        ("gatt.table30.baseline", "4", 10),
        ("pasta.llama_7b.multi_task", "all", 95.46),
    ],
)
def test_paper_numbers_are_the_published_ones(key, column, value):
    row = results.paper_result(key)
    assert (row["value"] if column is None else row["values"][column]) == value


def test_a_claim_comes_back_from_disk_as_it_was_saved(tmp_path):
    claim = {"claim": "window attention collapses", "ours": {"window": 6.5}, "interval": (3.0, 3.6)}
    claim |= {"holds": torch.tensor(True), "n": 3, "seeds": range(3)}
    claim |= {"profile": "smoke", "model": "tiny"}
    paper = results.paper_result("streaming.table1.window")
    row = results.save_claim(tmp_path / "04", "window", paper=paper, **claim)
    assert row == results.save_claim(tmp_path, "a", paper="streaming.table1.window", **claim)
    found = json.loads((tmp_path / "04" / "window.claim.json").read_text())
    assert found == row | {"interval": [3.0, 3.6]}
    assert found["holds"] is True and found["seeds"] == [0, 1, 2] and found["paper"] == paper
    assert found["versions"].keys() == {"python", "steerkit", "torch", "transformers", "numpy"}


def test_json_holds_tensors_arrays_and_infinity(tmp_path):
    value = {"t": torch.tensor([1.5, 2.0]), "a": np.float32(0.5), 3: float("inf"), "p": Path("x")}
    files.write_json(tmp_path / "a.json", value)
    back = json.loads((tmp_path / "a.json").read_text())
    assert back == {"t": [1.5, 2.0], "a": 0.5, "3": "inf", "p": "x"}


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    mean, low, high = statistics.bootstrap(values)
    half = 1.96 * values.std().item() / 4000**0.5
    assert mean == pytest.approx(values.mean().item())
    assert low == pytest.approx(mean - half, abs=half / 10)
    assert high == pytest.approx(mean + half, abs=half / 10)


def test_bootstrap_resamples_rows_together_and_repeats_exactly():
    column = torch.randn(50)
    mean, low, high = statistics.bootstrap(torch.stack([column, column + 1], dim=1))
    assert torch.allclose(high[1] - high[0], torch.ones(()).double())
    assert (mean[0].item(), low[0].item(), high[0].item()) == statistics.bootstrap(column)


def test_blocks_of_neighbours_are_averaged_first_without_what_is_missing():
    values = torch.randn(103, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    means = values[:100].view(10, 10).mean(1)
    assert statistics.bootstrap(values, block=10) == statistics.bootstrap(means)
    values[1::2] = torch.nan
    found = statistics.bootstrap(values, block=10)
    assert found == pytest.approx(statistics.bootstrap(values[:100:2].view(10, 5).mean(1)))
    values[20:30] = torch.nan  # a block without numbers
    assert statistics.bootstrap(values, block=10)[0] == pytest.approx(
        values[:100].nan_to_num().view(10, 10).sum(1).sum().item() / 45
    )
