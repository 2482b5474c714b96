"""The chat template that a config names, put into the tokenizer before anything is computed from it.

Masks, caches, exports and conversations all read the tokenizer, so one place decides for all of them. A name is an
item of kind `template`: its target is Jinja text, or `package.module:attribute` that holds such text.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, PluginError, did_you_mean

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Item
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".jinja"
ADDRESS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def chosen_template(ctx: Context, wanted: str) -> str:
    """The Jinja text that `hf.chat_template` means.

    Raises:
        ConfigError: no such file or name.
    """
    if not wanted.endswith(SUFFIX):
        return _declared(ctx, wanted)
    path = ctx.config.path(wanted)
    if not path.is_file():
        near = [other.name for other in path.parent.glob(f"*{SUFFIX}")]
        raise ConfigError(
            f"hf.chat_template is '{wanted}', but there is no file {path}",
            did_you_mean(path.name, near, "Templates there:"),
            "Correct hf.chat_template; a relative path starts at the config's folder.",
        )
    return path.read_text(encoding="utf-8")


def _declared(ctx: Context, name: str) -> str:
    items = ctx.items("template")
    if name in items:
        return _text(items[name])
    add = "" if items else " The plugin 'templates' declares the usual ones: add templates to plugins."
    raise ConfigError(
        f"there is no chat template '{name}' (hf.chat_template)",
        did_you_mean(name, items, "Active plugins declare:"),
        f"Correct hf.chat_template, or name a file that ends in {SUFFIX}.{add}",
    )


def _text(item: Item) -> str:
    target = item.target
    if isinstance(target, str) and ADDRESS.fullmatch(target):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, str):
        raise PluginError(
            f"the target of template '{item.name}' is a {type(target).__name__}",
            "A template is Jinja text, or the address of such text.",
            "Correct the plugin that declares it.",
        )
    return target


def set_template(ctx: Context, tokenizer: PreTrainedTokenizerBase, wanted: str) -> None:
    """Make the template that the config names the tokenizer's own.

    Raises:
        ConfigError: no such template, or it is no Jinja.
    """
    import jinja2

    if "MistralCommon" in type(tokenizer).__name__:
        raise ConfigError(
            f"hf.chat_template is '{wanted}', but this tokenizer writes conversations without a template",
            "It is mistral-common's, which has the format built in.",
            "Remove hf.chat_template, or set hf.tokenizer to one with a tokenizer.json.",
        )
    tokenizer.chat_template = chosen_template(ctx, wanted)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"hf.chat_template '{wanted}' is no valid Jinja, line {error.lineno}: {error.message}",
            "Every conversation is written with it.",
            "Correct the template.",
        ) from error
    except (jinja2.TemplateError, TypeError, LookupError):
        pass  # a template may ask for more than one message of a user; rows of the data will tell
