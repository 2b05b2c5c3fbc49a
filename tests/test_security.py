"""What could run foreign code, open a shell or reach a network: none of it is in the kit."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import steerkit
from steerkit.files import ROOT

PACKAGE = sorted((ROOT / "steerkit").rglob("*.py"))
SCRIPTS = [
    path for name in ("benchmarks", "data/make", "docs") for path in (ROOT / name).glob("*.py")
]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DANGEROUS = {"os.system", "os.popen", "eval", "exec", "compile", "torch.load", "yaml.load"}


def dangers(source: str) -> Iterator[str]:
    """Constructs that run foreign code or a shell, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if name and name.partition(".")[0] in PICKLES:
                    yield f"{node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in DANGEROUS:
                yield f"{node.lineno}: {called}"
            for option in node.keywords:
                off = isinstance(option.value, ast.Constant) and not option.value.value
                if option.arg in {"shell", "trust_remote_code", "allow_pickle"} and not off:
                    yield f"{node.lineno}: {option.arg} in {called}"


def test_no_source_runs_foreign_code_or_a_shell():
    found = {path: list(dangers(path.read_text(encoding="utf-8"))) for path in PACKAGE + SCRIPTS}
    assert len(found) > 40 and {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    import joblib.numpy_pickle",
        "torch.load('a.pt')",
        "exec(text)",
        "os.system('ls ' + name)",
        "subprocess.run(f'ls {name}', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_is_for_and_nothing_else(source):
    assert len(list(dangers(source))) == 1
    harmless = "np.load(p, allow_pickle=False); model.eval(); re.compile(x); f(shell=False)"
    assert list(dangers(harmless)) == []


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


def test_only_the_command_prints():
    """A library that prints cannot be used in a report."""
    printing = {
        f"{path.name}:{node.lineno}"
        for path in PACKAGE
        if path.name != "cli.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert printing == set()


def test_an_adapter_of_pickles_is_refused_before_it_is_read(tmp_path):
    config = (ROOT / "data" / "tiny-gatt" / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors; other formats can run"):
        steerkit.load(tmp_path)
