"""What the tests of the core share: made-up distributions, composed runs, configs, and the command line in process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import pytest
from pegbox.context import Context
from pegbox.plan import compose

sys.path.insert(0, str(Path(__file__).parent))

MODEL = {"name": "some/model"}


@dataclass(frozen=True)
class Site:
    """A folder on `sys.path` that distributions are installed into, as pip does: code beside a `.dist-info` folder."""

    folder: Path

    def install(
        self,
        distribution: str,
        version: str = "1.0",
        *,
        requires: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
        **entry_points: Mapping[str, str],
    ) -> None:
        """Install one distribution. `plugins`, `commands` and `recipes` are entry points, `files` its code."""
        groups = {"plugins": "pegbox", "commands": "pegbox.commands", "recipes": "pegbox.recipes"}
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        sections = [
            f"[{groups[group]}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        for name, text in (files or {}).items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    def install_project(self, project: Path) -> None:
        """Install a project as pip does with --no-deps: its wheel, built by its own backend, is unpacked here."""
        import hatchling.build

        with TemporaryDirectory() as built, chdir(project):
            wheel = Path(built) / hatchling.build.build_wheel(built)
            ZipFile(wheel).extractall(self.folder)
        importlib.invalidate_caches()

    def plugin(self, name: str, body: str = "pass", **options: Any) -> None:
        """Install distribution `dist-<name>` with the plugin `name`; `body` is the body of its class."""
        body = body.replace("\n", "\n    ")
        code = f"from pegbox.hooks import hookimpl\n\n\nclass Plugin:\n    {body}\n"
        module = f"plugin_of_{name}"
        self.install(f"dist-{name}", plugins={name: f"{module}:Plugin"}, files={f"{module}.py": code}, **options)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def composed() -> Callable[..., Context]:
    """Compose a run of ready plugin objects, listed in the order given; keywords are further keys of the config."""

    def compose_instances(plugins: dict[str, object], *overrides: str, **config: Any) -> Context:
        listed = {"model": MODEL, "plugins": list(plugins), **config}
        return compose(listed, overrides, instances=plugins)

    return compose_instances


@pytest.fixture
def compose_text(here: Path) -> Callable[..., Context]:
    """Write YAML to `c.yaml` in the current folder and compose it."""

    def compose_yaml(text: str, *overrides: str, **instances: object) -> Context:
        (here / "c.yaml").write_text(text)
        return compose("c.yaml", overrides, instances=instances)

    return compose_yaml


@dataclass(frozen=True)
class Exit:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def pegbox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Exit]:
    """The console script, run in this process."""
    from pegbox.cli import main

    def run_command(*arguments: str) -> Exit:
        monkeypatch.setattr(sys, "argv", ["pegbox", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        printed = capsys.readouterr()
        return Exit(int(str(code)), printed.out, printed.err)

    return run_command


WHOLE = """
from typing import Literal
from pegbox.errors import DataError, RunError
from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, Item, Model, Outcome


class WholeConfig(Section):
    end: Literal["finished", "interrupted", "failed", "bad data", "broken"] = setting("finished", "How it ends.")


class Network:
    def named_parameters(self):
        return []


class Rows:
    rank, split, fingerprint, total_steps = 0, "train", "", 1

    def gather_objects(self, value):
        return [value]

    def barrier(self):
        pass

    def list(self):
        return []

    def __len__(self):
        return 1


class Plugin:
    @hookimpl
    def register_config(self):
        return ConfigSection(schema=WholeConfig)

    @hookimpl
    def register_items(self):
        return [Item(kind=kind, name="transformers", target=self) for kind in ("model_format", "export_format")]

    @hookimpl
    def load_model(self, request):
        return Model(module=Network(), name="m", base="m", format="transformers", compute=None)

    @hookimpl
    def place_model(self, model):
        return model

    @hookimpl
    def run_training(self, ctx):
        end = ctx.section(WholeConfig).end
        if end == "failed":
            raise RunError("the loss is nan at step 3", "It grew.", "Set adamw.learning_rate lower.")
        if end == "bad data":
            raise DataError("rows.jsonl:7: no key 'messages'", "Each row needs it.", "Repair the row.")
        if end == "broken":
            raise ZeroDivisionError("a bug in a plugin")
        return Outcome(reason=end, step=3)

    @hookimpl
    def export_model(self, request):
        request.folder.mkdir(parents=True)
        (request.folder / "model").write_text("trained")
        return request.folder


def rows_of(hook):
    method = lambda ctx: Rows()
    method.__name__ = hook
    return staticmethod(hookimpl(method))


for hook in ("build_runtime", "load_processor", "build_dataset", "build_loss", "build_batches", "build_optimizer",
             "open_checkpoints"):
    setattr(Plugin, hook, rows_of(hook))
"""


@pytest.fixture
def whole(here: Path) -> Path:
    """A folder with `whole.py`, a local plugin that owns every job of a run, and a config `c.yaml` that lists it."""
    (here / "whole.py").write_text(WHOLE)
    (here / "c.yaml").write_text("model: {name: some/model}\nplugins: [./whole.py]\noutput: out\n")
    return here
