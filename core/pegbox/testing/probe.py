"""What a plugin does to a fresh interpreter: what its import loads, what declaring loads, and what it declares.

Imports and declarations are looked at in a process of their own, because in the one that runs the tests everything is
loaded already. The same declarations are collected here and there, so that the two can be compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

HEAVY = ("torch", "transformers", "triton", "peft", "datasets", "accelerate", "numpy", "tokenizers", "safetensors")
"""Libraries that no plugin loads before its work begins."""

START = """
import json, sys
request = json.load(sys.stdin)
sys.path[:] = request.pop("path")
from pegbox.testing.probe import look
print("\\n" + json.dumps(look(**request)))
"""


def look(value: str, mapping: dict[str, Any], plugin: str) -> dict[str, Any]:
    """Import a plugin and make its instance, then compose a config with it; what each of both loaded.

    Returns:
        `loaded`: top-level modules that importing the plugin and making its instance loaded, beyond those of the core.
        `heavy`: heavy libraries that are loaded after composing. `declared`: see `declarations`.
    """
    from importlib import import_module

    from pegbox.plan import compose

    before = set(sys.modules)
    module, _, attribute = value.partition(":")
    getattr(import_module(module), attribute or "Plugin")()
    tops = {name.partition(".")[0] for name in sys.modules.keys() - before}
    loaded = sorted(tops - {name.partition(".")[0] for name in before} - sys.stdlib_module_names)
    ctx = compose(mapping)
    heavy = [name for name in HEAVY if name in sys.modules]
    return {"loaded": loaded, "heavy": heavy, "declared": declarations(ctx.kernel, plugin)}


def declarations(kernel: Any, plugin: str) -> dict[str, Any]:
    """What a plugin declares, as plain data: the schema of its section, its items, its hooks."""
    from pegbox import hooks

    schema = kernel.schemas().get(plugin)
    items = dict(kernel.each(hooks.register_items)).get(plugin, ())
    return {
        "schema": schema and json.loads(json.dumps(schema.model_json_schema())),
        "items": [[item.kind, item.name, item.doc] for item in items],
        "hooks": sorted(implementation.hook for implementation in kernel.active[plugin].implementations),
    }


def in_another_process(value: str, mapping: Mapping[str, Any], plugin: str) -> dict[str, Any]:
    """`look` in a fresh interpreter; `error` in the answer if it failed."""
    return json.loads(_run(json.dumps({"value": value, "mapping": mapping, "plugin": plugin, "path": sys.path})))  # type: ignore[no-any-return]


@cache
def _run(request: str) -> str:
    done = subprocess.run([sys.executable, "-c", START], input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        return json.dumps({"error": done.stderr.strip()[-2000:]})
    return done.stdout.splitlines()[-1]
