"""A sample of docs/support.py, and what the page says about it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import support

score_heads = support.score_heads
PAGE = support.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "hybrid"),
    [
        ("gpt-oss (learned sinks, yarn)", False),
        ("Gemma 3", False),
        ("StableLM", False),
        ("Mamba", False),
        ("LFM2 (hybrid)", True),
        ("BERT (bidirectional)", False),
        ("T5", False),
        ("DeepSeek-V4 (learned sinks)", False),
    ],
)
def test_a_row_is_as_the_page_says(name: str, hybrid: bool) -> None:
    title = f"| {name}, `softmax_layers_only` |" if hybrid else f"| {name} |"
    row = next(line for line in PAGE.splitlines() if line.startswith(title))
    written = [cell.split()[0] for cell in row.split("|")[2:-1]]
    assert [answer for answer, _ in support.cells(name, hybrid=hybrid)] == written


def test_the_page_has_every_row_and_none_is_wrong() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    hybrids = sum("hybrid" in name for name in support.MODELS)
    assert len(rows) == 2 + len(support.MODELS) + hybrids and "WRONG" not in PAGE


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another strength than the reference's is seen by every check that steers."""
    monkeypatch.setattr(support, "SINKS", 2)
    monkeypatch.setattr(support, "visible", lambda t, sinks, window: [*range(t + 1)])
    monkeypatch.setattr(support, "emphasise", lambda *a, alpha: support.nullcontext())
    monkeypatch.setattr(
        support, "score_heads", lambda *a, alpha, **o: score_heads(*a, alpha=0.5, **o)
    )
    found = dict(zip(support.CHECKS, support.cells("Llama"), strict=True))
    assert [answer for answer, _ in found.values()] == ["yes", "WRONG", "WRONG", "WRONG", "WRONG"]
