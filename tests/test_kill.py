"""kill -9 in the middle: what was written before stays whole."""

import json
import os
import signal
import time
from pathlib import Path

from steerkit.files import write_json


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path, rows = tmp_path / "claim.json", 20_000
    for turn in range(12):
        if not (child := os.fork()):
            try:
                for number in range(10**6):
                    write_json(path, {"number": number, "rows": [number] * rows})
            finally:
                os._exit(1)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.01 + 0.007 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = json.loads(path.read_text())
        assert found["rows"] == [found["number"]] * rows
