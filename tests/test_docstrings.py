"""Every entry of the site's reference has an example, and it runs. Those of the ops are in tests/rfkernels."""

import doctest
import importlib
import inspect
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import mmdit
from mmdit.encoders import Conditioning

PAGES = (Path(__file__).parents[1] / "docs/site/pages.py").read_text()
LISTED = re.findall(r'"((?:mmdit|rfkernels)(?:\.\w+)+\.\w+)"', PAGES)
LISTED += [f"train.{name}" for name in re.findall(r'"((?:config|data|engine|objectives)(?:\.\w+)+)"', PAGES)]
LISTED += [f"mmdit.{name}" for name in mmdit.__all__ if not inspect.ismodule(getattr(mmdit, name))]
LISTED += [f"mmdit.presets.{name}" for name in ("by_depth", "tiny")]
WITHIN = {"Pipeline": ("from_pretrained", "from_single_file", "load_lora"), "Sampler": ("load",)}
NAMES = {"torch": torch, "np": np, "mmdit": mmdit, "tempfile": tempfile, "Path": Path, "Conditioning": Conditioning}


def test_the_reference_is_found():
    assert {"mmdit.MMDiT", "mmdit.checkpoint.load", "train.config.Config", "rfkernels.patch.apply.apply"} <= set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_examples_run(name):
    """Those that need released weights or a run are marked +SKIP."""
    import PIL.Image

    module, _, own = name.rpartition(".")
    thing = getattr(importlib.import_module(module), own)
    source = importlib.import_module(thing.__module__) if hasattr(thing, "__module__") else thing
    names = {**vars(source), **NAMES, "PIL": PIL}
    for part in (getattr(thing, within) for within in WITHIN.get(own, ())) if own in WITHIN else (thing,):
        (found,) = doctest.DocTestFinder(recurse=False).find(part, name, globs=dict(names))
        assert found.examples, name
        assert not doctest.DocTestRunner().run(found).failed
