"""The pages of the reference, and writing them: a folder of pages, and the config tables in the READMEs of plugins.

What is generated is compared and replaced as a whole. A page that is no longer made is removed if its first line says
that it was made here; nothing else in the folder is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pegbox.config import RunSection
from pegbox.discovery import discover
from pegbox.errors import DataError
from pegbox.hooks import SPECS, semantics
from pegbox.kernel import Implementation

from pegbox_docs import command_pages, error_pages, hook_pages, settings, type_pages
from pegbox_docs.installed import Described, Package, describe, packages_in, plugins_of

MADE_HERE = "<!-- Written by `pegbox docs --write`: change what it is made from, not this page. -->"
OPEN, CLOSE = "<!-- config -->", "<!-- /config -->"

CORE_KEYS = """# The config

A YAML file. The keys below are the core's; every other key is the name of an active plugin and holds its section.
`extends: other.yaml` (or `recipe://name`) builds upon another config; `key=value` on the command line replaces one
value. The YAML is 1.2's core: only `true` and `false` are booleans, and `2e-4` is a number."""

INDEX = """# Reference

Written by `pegbox docs` from what the code declares.

- [The config](config/index.md): the core's keys, and the section of each plugin
- [What hooks pass](types.md): the types in their signatures
- [Errors](errors.md): what is wrong, why, and what to type next
- [Commands](commands.md): the command line

## Hooks, in the order of a run"""

CONTENTS = """# pegbox docs NAME

## Hooks, in the order of a run

{hooks}

## Installed plugins

{plugins}

## More

- config: the core's keys
- errors: all errors of the core, or one by its id
- types: what hooks pass, or one by its name
- commands: the command line, or one command by its name"""


def pages(plugins: Sequence[Described], commands: Sequence[str] | None) -> dict[str, str]:
    """Every page of the reference by its path."""
    made = {f"hooks/{hook}.md": hook_pages.page(hook, plugins) for hook in SPECS}
    made |= {f"config/{plugin.name}.md": section_page(plugin) for plugin in plugins}
    made["config/index.md"] = core_keys_page(plugins)
    made["types.md"] = type_pages.page()
    made["errors.md"] = error_pages.page()
    made["commands.md"] = command_pages.page(commands)
    made["index.md"] = index_page(plugins)
    return {path: f"{MADE_HERE}\n\n{text}\n" for path, text in made.items()}


def section_page(plugin: Described) -> str:
    """The page of one plugin: what it brings, its hooks, its section of the config, its items."""
    parts = [
        f"# {plugin.name}",
        f"{plugin.summary}.",
        f"Distribution `{plugin.distribution}`; in a config: `plugins: [..., {plugin.name}]`",
        "## Hooks",
        "\n".join(_hook_line(implementation) for implementation in plugin.implementations) or "None.",
    ]
    if plugin.schema:
        doc = str(plugin.schema.get("description", ""))
        parts += [f"## Section `{plugin.name}`", doc, settings.tables(plugin.schema)]
    else:
        parts += ["## Section", "It has no section in the config."]
    if plugin.items:
        lines = [f"- {item.kind.replace('_', ' ')} `{item.name}`: {item.doc}".rstrip(" :") for item in plugin.items]
        parts += ["## Items", "\n".join(lines)]
    return "\n\n".join(filter(None, parts))


def _hook_line(implementation: Implementation) -> str:
    hook = implementation.hook
    role = "refines the result" if implementation.wrapper else _semantics(hook)
    return f"- [{hook}](../hooks/{hook}.md) ({role})"


def _semantics(hook: str) -> str:
    return {"own": "one owner", "fan_out": "fan-out"}.get(semantics(hook), semantics(hook))


def core_keys_page(plugins: Sequence[Described]) -> str:
    """The core's own keys, and a list of the sections of plugins."""
    table = settings.tables(RunSection.model_json_schema())
    return f"{CORE_KEYS}\n\n{table}\n\n## Sections of plugins\n\n{_plugin_list(plugins, '')}"


def index_page(plugins: Sequence[Described]) -> str:
    """The table of contents of the folder."""
    rows = [f"| [{hook}](hooks/{hook}.md) | {_semantics(hook)} | {hook_pages.first_sentence(hook)} |" for hook in SPECS]
    table = "\n".join(["| hook | semantics | what it is for |", "|---|---|---|", *rows])
    listed = _plugin_list(plugins, "config/")
    return f"{INDEX}\n\n{table}\n\n## Plugins and their settings\n\n{listed}"


def _plugin_list(plugins: Sequence[Described], folder: str) -> str:
    return "\n".join(f"- [{plugin.name}]({folder}{plugin.name}.md): {plugin.summary}" for plugin in plugins) or "None."


def contents() -> str:
    """What `pegbox docs` can show here, without importing any plugin."""
    hooks = "\n".join(f"- {hook}: {hook_pages.first_sentence(hook)}" for hook in SPECS)
    plugins = "\n".join(f"- {name}: {', '.join(map(str, found))}" for name, found in sorted(discover().items()))
    return CONTENTS.format(hooks=hooks, plugins=plugins or "None.")


def readmes(packages: Sequence[Package]) -> dict[Path, str]:
    """The READMEs of the packages that bring a plugin, with their config tables filled in."""
    made = {}
    for package in packages:
        path = package.folder / "README.md"
        if package.plugins and path.is_file():
            tables = [settings.tables(schema) for name in package.plugins if (schema := describe(name).schema)]
            made[path] = filled(path, "\n\n".join(tables) or "No settings.")
    return made


def filled(path: Path, table: str) -> str:
    """A README with `table` between its markers."""
    text = path.read_text(encoding="utf-8")
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise DataError(
            f"{path} has no single pair of config markers",
            "The table of settings is generated, and goes between them.",
            f"Put these two lines where it belongs:\n{OPEN}\n{CLOSE}",
        )
    before, _, rest = text.partition(OPEN)
    return f"{before}{OPEN}\n{table}\n{CLOSE}{rest.partition(CLOSE)[2]}"


def wanted_files(
    folder: Path | None, package_folders: Sequence[Path] = (), readme_folders: Sequence[Path] = ()
) -> dict[Path, str | None]:
    """Every file that should exist, with its text; None for a page that was made here once and is not any more.

    Args:
        folder: of the pages; None: no pages.
        package_folders: the pages cover the packages in them; without any, every installed plugin of a distribution
            whose name starts with `pegbox-`.
        readme_folders: also fill the config tables in the READMEs of the packages in these, and cover them.
    """
    files: dict[Path, str | None] = dict(readmes(packages_in(readme_folders)))
    if folder is None:
        return files
    packages = packages_in(list(dict.fromkeys([*package_folders, *readme_folders])))
    if packages:
        plugins, commands = plugins_of(packages), [name for package in packages for name in package.commands]
    else:
        names = [name for name, found in sorted(discover().items()) if found[0].distribution.startswith("pegbox-")]
        plugins, commands = [describe(name) for name in names], None
    current = {folder / path: text for path, text in pages(plugins, commands).items()}
    stale = [path for path in folder.rglob("*.md") if path not in current and _made_here(path)]
    return {**files, **dict.fromkeys(stale), **current}


def differing(files: Mapping[Path, str | None]) -> list[Path]:
    """The files that are not as they should be, sorted."""
    return sorted(
        path for path, text in files.items() if (path.read_text(encoding="utf-8") if path.is_file() else None) != text
    )


def write(files: Mapping[Path, str | None]) -> list[Path]:
    """Make the files as they should be; those that were changed."""
    changed = differing(files)
    for path in changed:
        text = files[path]
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return changed


def _made_here(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith(MADE_HERE)
