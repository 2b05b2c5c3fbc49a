"""The laboratory: run notebooks, collect their claims, make and check a class's exercises.

No paper: this room only carries the notebooks, and knows none of them by name.
Begin with `runner.py` (one run), then `exercises.py`; `cli.py` is the command `steerkit`.
"""
