"""A bar is made only for work that lasts, and never more than one a call."""

from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from steerkit import progress as module
from steerkit import recomputed_losses, token_losses
from steerkit.progress import progress


class Bar:
    """Stands in for tqdm: counts what a notebook would show."""

    made: ClassVar[list["Bar"]] = []

    def __init__(self, *, total: int, initial: int, **look: object) -> None:
        self.total, self.n, self.closed = total, initial, False
        Bar.made.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it: clock[0] in seconds."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_short_work_makes_no_bar(bars: list[Bar], clock: list[float]) -> None:
    with progress(10, unit="steps", after=2.0) as update:
        for _ in range(10):
            clock[0] += 0.19
            update(1)
    assert bars == []


def test_long_work_makes_one_bar_that_has_counted_from_the_start(
    bars: list[Bar], clock: list[float]
) -> None:
    with progress(10, unit="steps", after=2.0) as update:
        for _ in range(4):
            clock[0] += 1.0
            update(2)
        (bar,) = bars
        assert (bar.n, bar.total, bar.closed) == (8, 10, False)
    assert bar.closed


def test_work_that_is_done_makes_no_bar(bars: list[Bar], clock: list[float]) -> None:
    with progress(1, unit="steps", after=2.0) as update:
        clock[0] = 60.0
        update(1)
    assert bars == []


def test_an_exception_closes_the_bar_and_passes(bars: list[Bar], clock: list[float]) -> None:
    with pytest.raises(KeyError), progress(10, unit="steps", after=0.0) as update:
        update(1)
        raise KeyError
    assert bars[0].closed


def test_losses_of_many_short_streams_make_no_bar(
    bars: list[Bar], clock: list[float], tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    ids = torch.arange(24).view(1, -1)
    for _ in range(20):
        token_losses(model, ids, sinks=1, window=6, block=4)
        recomputed_losses(model, ids, length=6, batch=4)
    assert bars == []
    minutes = count(step=60.0)  # now each block takes one
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    token_losses(model, ids, sinks=1, window=6, block=4)
    recomputed_losses(model, ids, length=6, batch=4)
    assert [(bar.n, bar.total, bar.closed) for bar in bars] == [(23, 23, True), (18, 18, True)]
