"""The rules of the house: imports run one way, files stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"rfkernels": set(), "mmdit": {"rfkernels"}, "train": {"rfkernels", "mmdit"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_from_train_to_mmdit_to_rfkernels(package):
    forbidden = {"rfkernels", "mmdit", "train", "bench", "tests"} - MAY_IMPORT[package] - {package}
    for path in (ROOT / package).rglob("*.py"):
        found = set(imports(path)) & forbidden
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_no_file_above_400_lines_without_a_reason():
    for package in (*MAY_IMPORT, "bench", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            lines = path.read_text().splitlines()
            reason = "lines because" in (ast.get_docstring(ast.parse("\n".join(lines))) or "")
            assert len(lines) <= 400 or reason, f"{path.relative_to(ROOT)} has {len(lines)} lines"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_importing_needs_no_optional_package(package):
    """Top-level imports of each module stay within the core dependencies."""
    import sys

    core = {"torch", "numpy", "safetensors", "tyro", "tqdm", "PIL", *MAY_IMPORT, *sys.stdlib_module_names}
    for path in (ROOT / package).rglob("*.py"):
        body = ast.parse(path.read_text()).body
        top = {
            name.split(".")[0]
            for node in body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        allowed = core | {"triton"} if path.name.endswith("kernels.py") else core      # imported at a launch
        if path.name == "plugin.py":
            allowed = core | {"pytest"}                                                         # of pytest, by pytest
        assert top <= allowed, f"{path.relative_to(ROOT)} imports {top - core} on import"


def test_slow_tests_are_there():
    """Each name in the table of tests/README.md is that of a test, or of a file."""
    from tests.conftest import SLOW

    assert len(SLOW) > 15
    for name in SLOW:
        file, _, test = name.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test.split('[')[0]}(" in text, name
