"""What could run foreign code, open a shell or reach a network: none of it is in the kit."""

import pkgutil
import re
import subprocess
import sys

import pytest

import steerkit
from steerkit.files import ROOT

SOURCES = [
    path
    for name in ("steerkit", "benchmarks", "data/make", "docs")
    for path in (ROOT / name).rglob("*.py")
]


def test_no_source_runs_foreign_code():
    """What ruff's rules S and T20 (pyproject.toml) do not see: pickles, code of a checkpoint."""
    pickles = r"^\s*(?:import|from) (?:pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b"
    foreign = re.compile(
        rf"{pickles}|torch\.load\(|(?:trust_remote_code|allow_pickle)=(?!False)", re.MULTILINE
    )
    assert foreign.search("f(trust_remote_code=True)") and foreign.search("x\n  import joblib.a")
    assert len(SOURCES) > 40 and not [p for p in SOURCES if foreign.search(p.read_text())]


@pytest.mark.parametrize("name", ["Makefile", "README.md", "environment.yml", ".ci/run"])
def test_jupyters_token_and_host_stay_as_they_are(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(
        r"(?:App|Provider)\.(?:token|password)|--ip|0\.0\.0\.0|allow[-_]root|allow_origin", text
    )


def test_no_module_opens_a_connection_or_prints_at_import():
    """In one interpreter whose sockets and name look-ups end it at once."""
    code = (
        "import os, socket\n"
        "socket.socket.connect = socket.getaddrinfo = lambda *a, **k: os._exit(99)\n"
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    modules = pkgutil.walk_packages(steerkit.__path__, "steerkit.")
    names = [module.name for module in modules if module.name != "steerkit.__main__"]
    assert "steerkit.lab.runner" in names
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_adapter_of_pickles_is_refused_before_it_is_read(tmp_path):
    config = (ROOT / "data" / "tiny-gatt" / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors; other formats can run"):
        steerkit.load(tmp_path)
