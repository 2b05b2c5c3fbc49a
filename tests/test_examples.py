"""Each name that steerkit exports has an example in its docstring, and the example runs."""

import ast
import doctest

import pytest

import steerkit
from steerkit.files import PACKAGE

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", steerkit.__all__)
def test_the_example_of_each_exported_name_runs(name):
    thing = getattr(steerkit, name)
    examples = doctest.DocTestParser().get_doctest(thing.__doc__, {}, name, None, None)
    assert examples.examples, f"steerkit.{name} has no example: add `>>> ...` to its docstring"
    report: list[str] = []
    failed = doctest.DocTestRunner(optionflags=OPTIONS).run(examples, out=report.append).failed
    assert failed == 0, "".join(report)


def test_the_stub_for_editors_names_what_is_exported():
    _, *imports = ast.parse((PACKAGE / "__init__.pyi").read_text()).body
    found = [(i.module, name.name, name.asname) for i in imports for name in i.names]
    names = [(f"steerkit.{module}", n, n) for n, module in steerkit._MODULES.items()]
    assert sorted(found) == sorted(names)
