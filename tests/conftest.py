"""What all tests share: one thread, no network, small notebooks made on the spot, and an order in
which two workers are busy to the end."""

import os
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Before torch is imported, and inherited by kernels: on shared cores one thread is the faster.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "JUPYTER_PLATFORM_DIRS": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(HERE / "no_network"), str(HERE.parent), os.environ.get("PYTHONPATH")))
    ),
}
sys.path.insert(0, str(HERE.parent))
runpy.run_path(str(HERE / "no_network" / "sitecustomize.py"))

import nbformat  # noqa: E402
import pytest  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from steerkit.models import load  # noqa: E402

torch.set_num_threads(1)

PARAMETERS = 'PROFILE: str = "cpu"  # smoke, cpu or gpu\nN: int = 2  # how many'
NotebookMaker = Callable[..., Path]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `first(seconds)` come first, the longest before all; workers share one order."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("first")
        return mark.args[0] if mark else 0

    items.sort(key=seconds, reverse=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n 2`: tests whose ids end in one @group meet one worker, so that what they
    share is made once; all others go to whoever is free."""
    # Not `--dist loadgroup`: pytest 9.2 ignores the node ids that xdist 3.8 writes for it.
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = re.search(r"@(\w+)\]$", nodeid)
            return group[1] if group else nodeid

    config.option.loadscopereorder = False
    return Groups(config, log)


def write_notebook(root, name, cells, *, parameters=PARAMETERS):
    """Put a notebook of a parameters cell and `cells` into the kit at `root`."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    rest = [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *rest], metadata=metadata), path)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kit, and the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make_notebook(root: Path) -> NotebookMaker:
    """make_notebook("01_name", ["code", ...], parameters=...) -> path in the empty kit."""
    return partial(write_notebook, root)


@pytest.fixture(scope="session")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded chat model and its tokenizer, loaded once; tests leave it as they found it."""
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A tiny random Llama with grouped queries, one for each test file."""
    return tiny_models.tiny("llama")
