"""What the first cell of notebook 04 promises is what its last stored run has measured."""

import math
import re

import nbformat
import pytest

from steerkit.files import ROOT, read_json

STORED = ROOT / "figures" / "cpu" / "04_streaming_llm"
FRONT = "re-computation, first token in front"
SETTINGS = ("window", "StreamingLLM", "re-computation", FRONT)


@pytest.mark.parametrize(
    ("words", "stream"), [("an endless market", "market"), ("held-out English", "English")]
)
def test_the_headline_is_measured_and_leaves_no_setting_out(words: str, stream: str) -> None:
    head = nbformat.read(ROOT / "notebooks" / "04_streaming_llm.ipynb", as_version=4).cells[0]
    told = re.search(rf"\| ours, {words} \|(.*)\|$", head.source, re.MULTILINE)[1].split("|")
    found = read_json(STORED / "table1.json")["values"][stream]
    assert [float(number) for number in told] == pytest.approx(
        [found[setting] for setting in SETTINGS], rel=0.04
    )


def test_figure_3_has_all_settings_on_the_same_tokens() -> None:
    """Re-computation was once left out where it is the same, and then averaged over others."""
    values = read_json(STORED / "figure3.json")["values"]
    for stream in ("English", "market"):
        assert set(values[stream]) == {"dense", *SETTINGS}
        for losses in values[stream].values():
            assert len(losses) == len(values["position"])
            assert all(loss is not None and math.isfinite(loss) for loss in losses)
