"""What the library itself does to networks of these families, as JSON. It changes transformers: run it alone."""

from __future__ import annotations

import json
import sys

from liger_kernel.transformers import _apply_liger_kernel_to_instance
from tiny_networks import network_of

found = {}
for family in sys.argv[1:]:
    network = network_of(family)
    _apply_liger_kernel_to_instance(network)
    found[family] = {
        name: [module.variance_epsilon, module.offset, module.casting_mode]
        for name, module in network.named_modules()
        if hasattr(module, "casting_mode")
    }
print(json.dumps(found))
