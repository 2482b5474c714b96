"""One page for each hook: its signature, what its verb means, its words from `pegbox.hooks`, and who implements it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from pegbox import hooks
from pegbox.hooks import SPECS
from pegbox.kernel import PER_FORMAT

from pegbox_docs.installed import Described
from pegbox_docs.type_pages import documented_types

MEANING: dict[str, str] = {
    "register": """**A declaration.** Every active plugin may answer, in the order of the config's `plugins:` list,
before the config is final: no context, no input or output. A name declared twice is an error that names both.""",
    "configure": """**Records that are merged.** Every active plugin may answer; the kernel merges the records field by
field. Two values for one field are an error that names both plugins.""",
    "own": """**One owner.** Exactly one active plugin makes the object{per_format}. If several could, the config says
which with `use: {{{hook}: plugin}}`; otherwise it is an error before the run starts. Other plugins may refine the
result with `@hookimpl(wrapper=True)`, in list order; a wrapper never changes arguments.""",
    "patch": """**Declarative patches.** Every active plugin may return patch records; the kernel applies them in list
order, refuses two patches on one module and slot, proves in the first step that each one is called, and can undo
them.""",
    "fan_out": """**Fan-out.** All active plugins that implement it run, in list order, and each result keeps its own
name. A name given twice is an error that names both plugins.""",
    "observe": """**Observers.** All active plugins that implement it are told, in list order. An exception stops the
run unless the plugin declares `best_effort = True`; the answers are combined.""",
}


def signature(hook: str) -> str:
    """`load_model(ctx: Context, request: ModelRequest) -> Model`, without the names of modules."""
    return hook + re.sub(r"'|\b\w+\.", "", str(inspect.signature(SPECS[hook])))


def first_sentence(hook: str) -> str:
    """The first sentence of a hook's words."""
    return re.split(r"(?<=\.) ", " ".join(words(hook).split()), maxsplit=1)[0]


def words(hook: str) -> str:
    """What `pegbox.hooks` says of a hook."""
    return inspect.getdoc(SPECS[hook]) or ""


def page(hook: str, plugins: Sequence[Described]) -> str:
    """The page of one hook."""
    per_format = f", for each {PER_FORMAT[hook].replace('_', ' ')}" if hook in PER_FORMAT else ""
    meaning = MEANING[hooks.semantics(hook)].format(hook=hook, per_format=per_format)
    if hook == "build_dataset":
        meaning += " The owner may answer None."
    parts = [
        f"# {hook}",
        f"```python\n{signature(hook)}\n```",
        words(hook),
        meaning,
        _types(hook),
        _place(hook),
        f"## Implemented by\n\n{implementers(hook, plugins)}",
        f"## In a plugin\n\n```python\n{_sample(hook)}\n```",
    ]
    return "\n\n".join(filter(None, parts))


def implementers(hook: str, plugins: Sequence[Described]) -> str:
    """Who implements a hook among these plugins, as a list."""
    lines = []
    for plugin in sorted(plugins, key=lambda plugin: plugin.name):
        for implementation in plugin.implementations:
            if implementation.hook == hook:
                formats = "" if implementation.wrapper else plugin.formats(hook)
                extra = (" (wrapper)" if implementation.wrapper else "") + (f" ({formats})" if formats else "")
                lines.append(f"- [{plugin.name}](../config/{plugin.name}.md){extra}: {plugin.summary}")
    return "\n".join(lines) or "No plugin of this repository."


def _types(hook: str) -> str:
    known = documented_types()
    named = [name for name in re.findall(r"[A-Z]\w+", signature(hook)) if name in known]
    links = [f"[{name}](../types.md#{name.lower()})" for name in dict.fromkeys(named)]
    return f"Types: {', '.join(links)}." if links else ""


def _place(hook: str) -> str:
    order = list(SPECS)
    at = order.index(hook)
    before = f"after [{order[at - 1]}]({order[at - 1]}.md)" if at else ""
    after = f"before [{order[at + 1]}]({order[at + 1]}.md)" if at + 1 < len(order) else ""
    return f"Hook {at + 1} of {len(order)} in the order of a run: {', '.join(filter(None, (before, after)))}."


def _sample(hook: str) -> str:
    head = signature(hook).replace(f"{hook}(", f"{hook}(self, ").replace("(self, )", "(self)")
    lines = ["class Plugin:", "    @hookimpl", f"    def {head}: ..."]
    if hooks.semantics(hook) == "own":
        result = head.rpartition(" -> ")[2]
        arguments = head.partition(" -> ")[0]
        lines += [
            "",
            "",
            "class Refining:",
            "    @hookimpl(wrapper=True)",
            f"    def {arguments} -> Generator[None, {result}, {result}]:",
            "        made = yield",
            "        return made",
        ]
    return "\n".join(lines)
