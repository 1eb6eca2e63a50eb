"""A pytest plugin: every model of a kind that `rfkernels.patch` knows is patched as it is constructed."""

import functools

import diffusers

from rfkernels import patch

MODELS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel", "SD3ControlNetModel")


def patched(construct):
    @functools.wraps(construct)
    def run(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        patch.apply(self)

    return run


for name in MODELS:
    model = getattr(diffusers, name)
    model.__init__ = patched(model.__init__)
