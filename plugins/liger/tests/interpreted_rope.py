"""Loss and gradients with the library's rotary embeddings, which Triton's interpreter can run, and without them."""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch
from pegbox import hooks
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.types import Model
from tiny_networks import network_of, outcome_of

SECTION = {"rope": True, "rms_norm": False, "layer_norm": False, "swiglu": False, "geglu": False}

for family in sys.argv[1:]:
    network = network_of(family)
    expected = outcome_of(network)
    model = Model(module=network, name=family, base=family, format="transformers", compute=lambda *_: None)
    with TemporaryDirectory() as folder:
        ctx = compose({"model": {"name": "x"}, "plugins": ["liger"], "liger": SECTION, "output": folder})
        ctx.runtime = FakeRuntime()
        log = PatchLog()
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    found = outcome_of(network)
    log.verify()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    print(family, len(log.applied))
