"""The chat template that a config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, PluginError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.types import Item, Processor
from transformers import AutoTokenizer

Compose = Callable[..., Context]
SHOUT = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


class Templates:
    """Declares templates, as the plugin of that name does."""

    @hookimpl
    def register_items(self) -> list[Item]:
        return [
            Item(kind="template", name="shout", target=SHOUT),
            Item(kind="template", name="stored", target="string:punctuation"),
            Item(kind="template", name="broken", target="{% for %}"),
            Item(kind="template", name="number", target=3),
            Item(kind="template", name="picky", target="{{ raise_exception('more messages') }}"),
        ]


def load(folder: Path, template: str | None, plugins: tuple[str, ...] = ("hf", "templates")) -> Processor:
    section = {} if template is None else {"chat_template": template}
    config = {"model": {"name": str(folder)}, "plugins": list(plugins), "hf": section}
    ctx = compose(config, instances={"templates": Templates()})
    return ctx.call(hooks.load_processor, ctx)


def test_a_named_template_becomes_the_tokenizers_own(folder: Path, tmp_path: Path) -> None:
    own, named = load(folder, None), load(folder, "shout")
    assert named.tokenizer.chat_template == SHOUT
    assert named.tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "HI"
    assert named.fingerprint != own.fingerprint
    named.tokenizer.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == SHOUT


def test_a_target_may_be_the_address_of_the_text(folder: Path) -> None:
    import string

    assert load(folder, "stored").tokenizer.chat_template == string.punctuation


def test_a_file_is_found_from_the_configs_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(SHOUT)
    (tmp_path / "run.yaml").write_text(f"model: {{name: {folder}}}\nplugins: [hf]\nhf: {{chat_template: mine.jinja}}\n")
    ctx = compose(str(tmp_path / "run.yaml"))
    assert ctx.call(hooks.load_processor, ctx).tokenizer.chat_template == SHOUT


@pytest.mark.parametrize(
    ("template", "plugins", "says"),
    [
        ("shoot", ("hf", "templates"), "Did you mean 'shout'"),
        ("chatml", ("hf",), "add templates to plugins"),
        ("none.jinja", ("hf",), r"there is no file .*none\.jinja"),
        ("broken", ("hf", "templates"), "is no valid Jinja, line 1"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(template: str, plugins: tuple, says: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        load(folder, template, plugins)
    assert raised.value.next


def test_a_target_that_is_no_text_blames_the_plugin(folder: Path) -> None:
    with pytest.raises(PluginError, match="the target of template 'number' is a int"):
        load(folder, "number")


def test_a_template_may_refuse_the_trial_message(folder: Path) -> None:
    assert "raise_exception" in load(folder, "picky").tokenizer.chat_template
