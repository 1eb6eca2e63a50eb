"""The ops as a kernel that Hugging Face's package `kernels` loads: python -m rfkernels.hub FOLDER

    ops = kernels.get_local_kernel(Path("FOLDER"))
    y = ops.adaln(x, shift, scale)

Such a kernel is loaded under a name of its own, from any path and beside other versions of itself, so imports within
the package become relative, and its operators are registered under that name. Triton compiles for the GPU at hand: one
copy serves every version of PyTorch. The native code is not part of it, so on a CPU plain PyTorch runs. On the Hub the
folder goes to the branch v0 of a kernel repository, from which `kernels.get_kernel(..., version=0)` takes it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

import rfkernels

BACKENDS = ("cuda", "cpu")
LEFT_OUT = ("inspect", "sanitize", "hub.py", "report.py", "csrc", "__pycache__")
"""Tools for who works on the package."""
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernel, triton]
---

# rfkernels {version}

Fused ops for MM-DiT, the Stable Diffusion 3 architecture, in Triton: `{ops}`. For NVIDIA GPUs; on a CPU plain
PyTorch computes the same.

```python
from kernels import get_kernel

ops = get_kernel("OWNER/rfkernels", version={number}, trust_remote_code=["OWNER/rfkernels"])
y = ops.adaln(x, shift, scale)
print(ops.explain("adaln", x, shift, scale))          # which implementation runs, and why
```

Arguments, shapes and errors are in each op's docstring. The native CPU code, the native launcher and the CUDA kernels
are not part of this build; `pip install rfkernels` has them.
"""


def relative(source: str, depth: int) -> str:
    """The code of a module, its imports of the package made relative.

    Args: depth: folders between the module and the package's root."""
    lines, dots = source.splitlines(keepends=True), "." * (depth + 1)
    for node in ast.walk(ast.parse(source)):
        line = node.lineno - 1 if isinstance(node, (ast.Import, ast.ImportFrom)) else 0
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rfkernels":
            rest = node.module.removeprefix("rfkernels").removeprefix(".")
            lines[line] = lines[line].replace(f"from {node.module} import", f"from {dots}{rest} import", 1)
        elif isinstance(node, ast.Import) and any(name.name.split(".")[0] == "rfkernels" for name in node.names):
            statement = f'rfkernels = __import__("importlib").import_module("{dots}", __package__)'
            lines[line] = lines[line].replace("import rfkernels", statement, 1)
    return "".join(lines)


def written(folder: Path) -> list[Path]:
    """Writes the kernel for each of BACKENDS: folder/build/torch-BACKEND, and a card. Returns: their folders.

    Raises: ValueError for a folder with another README.md than such a card."""
    card = folder / "README.md"
    if card.exists() and not card.read_text().startswith(CARD.partition("license")[0]):
        raise ValueError(f"{card} is there and no card of a kernel; give a folder of its own")
    root = Path(rfkernels.__file__).parent
    files: dict[Path, bytes] = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        if not path.is_file() or any(part in LEFT_OUT for part in place.parts):
            continue
        content = path.read_bytes()
        files[place] = relative(content.decode(), len(place.parent.parts)).encode() if path.suffix == ".py" else content
    digest = hashlib.sha256(b"".join(str(p).encode() + b"\0" + c for p, c in files.items())).hexdigest()[:12]
    found, number = [], int(rfkernels.__version__.split(".")[0])
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for place, content in files.items():
            (variant / place).parent.mkdir(parents=True, exist_ok=True)
            (variant / place).write_bytes(content)
        about = {
            "name": "rfkernels", "id": f"_rfkernels_{backend}_{digest}", "version": number, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
        found.append(variant)
    ops = "`, `".join(name for name in rfkernels.__all__ if name[0].islower())
    card.write_text(CARD.format(version=rfkernels.__version__, ops=ops, number=number))
    return found


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m rfkernels.hub FOLDER\n\nWrite the ops as a kernel of Hugging Face's package `kernels`.")
        return 0 if sys.argv[1:] == ["--help"] else 2
    try:
        made = written(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"wrote {variant}" for variant in made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
