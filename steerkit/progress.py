"""A progress bar that appears once there is something to wait for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

PATIENCE = 2.0  # seconds of work before a bar is worth its messages


@contextmanager
def progress(
    total: int, *, unit: str, after: float = PATIENCE, every: float = 1.0
) -> Iterator[Callable[[int], None]]:
    """Yield `update(n)`, to be called with the units just done; `after`, `every` in seconds.

    The bar is made when `after` has passed, redrawn once in `every`, and gone at the end. In a
    notebook each bar opens eleven widgets, shown or not (tqdm's own `delay` only hides them), and a
    client that reads messages after the cell, as nbval does, loses what goes beyond a few thousand.
    """
    start, done, bar = time.monotonic(), 0, None

    def update(n: int) -> None:
        nonlocal done, bar
        done += n
        if bar is not None:
            bar.update(n)
        elif done < total and time.monotonic() - start >= after:
            look = {"unit": f" {unit}", "unit_scale": True, "mininterval": every, "leave": False}
            bar = tqdm(total=total, initial=done, **look)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()
