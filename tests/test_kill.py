"""kill -9 in the middle of a write: what was written before stays whole."""

import json
import os
import signal
import time
from pathlib import Path

from steerkit.files import write_json


def slowly(path: Path, content: bytes) -> None:
    """As on a slow disk: a page at a time."""
    with path.open("wb") as file:
        for start in range(0, len(content), 4096):
            file.write(content[start : start + 4096])
            file.flush()
            time.sleep(0.001)


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path):
    path, rows = tmp_path / "claim.json", 20_000
    write_json(path, {"number": 0, "rows": [0] * rows})
    for turn in range(12):
        if not (child := os.fork()):
            try:
                Path.write_bytes = slowly
                for number in range(10**6):
                    write_json(path, {"number": number, "rows": [number] * rows})
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.013 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = json.loads(path.read_text())
        assert found["rows"] == [found["number"]] * rows
