"""Everything a person can type wrongly: each mistake ends with exit code 2, no trace, and words that teach.

A case is what is written and typed, and pieces of the message: what is wrong with the value seen, where it stands, and
what to type instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pegbox.discovery import discover

HEAD = "model: {name: some/model}\n"
ADAPT = HEAD + "plugins: [adapt]\n"
PLAN = ("plan", "c.yaml")


@dataclass(frozen=True)
class Case:
    """Files by name (text, or bytes), what is typed after `pegbox`, and what the message must say."""

    config: str | bytes | None
    says: tuple[str, ...]
    typed: tuple[str, ...] = PLAN
    files: dict[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()


def overriding(*overrides: str) -> tuple[str, ...]:
    return (*PLAN, *overrides)


CASES = {
    # the command line
    "unknown-command": Case(None, ("No such command 'rnu'", "run"), ("rnu",)),
    "unknown-option": Case(HEAD, ("--seed",), (*PLAN, "--seed=3")),
    "no-config-named": Case(None, ("Missing argument", "CONFIG"), ("run",)),
    "config-missing": Case(HEAD, ("'d.yaml' does not exist", "command line", "'c.yaml'"), ("plan", "d.yaml")),
    "config-is-a-folder": Case(HEAD, ("is a folder", "c.yaml", "pegbox run CONFIG.yaml"), ("plan", ".")),
    "config-forgotten": Case(HEAD, ("'seed=3' does not exist", "CONFIG.yaml"), ("plan", "seed=3")),
    "override-without-value": Case(HEAD, ("'seed' is no override", "key=value", "lora.r=8"), overriding("seed")),
    "override-with-a-space": Case(HEAD, ("'se ed=3' is no override",), overriding("se ed=3")),
    "setting-as-an-option": Case(HEAD, ("--adapt.rank", "Write adapt.rank=VALUE"), (*PLAN, "--adapt.rank", "8")),
    "setting-as-an-option-with-a-value": Case(HEAD, ("Write adapt.rank=VALUE",), (*PLAN, "--adapt.rank=8")),
    "override-with-dashes": Case(HEAD, ("--seed", "seed"), overriding("--", "--seed=3")),
    "override-of-broken-yaml": Case(HEAD, ("override 'plugins=[a'", "no valid YAML"), overriding("plugins=[a")),
    "override-beyond-a-list": Case(
        ADAPT + "adapt: {sources: [{path: a}]}\n",
        ("cannot set 'adapt.sources.1' (command line)", "holds 1 values", "Set adapt.sources as a whole"),
        overriding("adapt.sources.1.path=b"),
    ),
    "override-of-a-wrong-type": Case(
        ADAPT,
        ("'adapt.rank' is \"high\" (command line)", "valid integer", "Rank of the update."),
        overriding("adapt.rank=high"),
    ),
    "override-of-a-union-with-a-misspelt-word": Case(
        ADAPT,
        ("error: 'adapt.kind' is \"sigmiod\" (command line)", "\nOne kind, or", "\nDid you mean 'sigmoid'?"),
        overriding("adapt.kind=sigmiod"),
    ),
    "override-of-a-union-with-another-word": Case(
        ADAPT, ("error: 'adapt.kind' is \"zzz\"", "'sigmoid' or 'hinge'\n"), overriding("adapt.kind=zzz")
    ),
    "override-below-a-word": Case(
        HEAD, ("'model.name'", '{"size": 3}', "(command line)"), overriding("model.name.size=3")
    ),
    "override-of-an-unknown-key": Case(
        ADAPT,
        ("unknown key 'rnk' in section 'adapt' (command line)", "Did you mean 'rank'?"),
        overriding("adapt.rnk=3"),
    ),
    "processes-below-one": Case(HEAD, ("--processes",), ("run", "c.yaml", "--processes", "0")),
    # YAML
    "tab": Case("model:\n\tname: m\n", ("c.yaml:2", "\\t")),
    "bracket": Case("model: {name: m\nseed: 3\n", ("c.yaml:2", "no valid YAML", "brackets")),
    "quote": Case("model: {name: 'm}\n", ("c.yaml:2", "no valid YAML")),
    "two-documents": Case(HEAD + "---\nseed: 1\n", ("c.yaml:2", "another document")),
    "python-tag": Case("model: !!python/object/apply:os.getcwd []\n", ("c.yaml",)),
    "own-tag": Case(HEAD + "seed: !env SEED\n", ("c.yaml:2", "!env")),
    "alias-of-nothing": Case("model: *tiny\n", ("c.yaml:1", "tiny")),
    "alias-of-itself": Case("model: &a {name: *a}\n", ("c.yaml", "no valid YAML")),
    "key-twice": Case(HEAD + "seed: 1\nseed: 2\n", ("key 'seed' stands twice (c.yaml:3)", "Remove one")),
    "inner-key-twice": Case("model:\n  name: a\n  name: b\n", ("key 'model.name' stands twice (c.yaml:3)",)),
    "a-list": Case("- model: m\n", ("c.yaml must hold a mapping",)),
    "a-word": Case("model\n", ("c.yaml must hold a mapping",)),
    "not-text": Case(b"model: {name: \xff\xfe}\n", ("c.yaml", "no valid YAML")),
    "a-list-as-key": Case(HEAD + "? [a]\n: 1\n", ("c.yaml:2",)),
    # extends and recipes
    "extends-missing": Case(
        "extends: bse.yaml\n", ("'bse.yaml' does not exist (c.yaml:1)", "'base.yaml'"), files={"base.yaml": HEAD}
    ),
    "extends-itself": Case("extends: c.yaml\n", ("'c.yaml' extends itself: c.yaml -> c.yaml",)),
    "extends-in-a-circle": Case(
        "extends: d.yaml\n", ("c.yaml -> d.yaml -> c.yaml",), files={"d.yaml": "extends: ./c.yaml\n"}
    ),
    "extends-a-list": Case(HEAD + "extends: [a.yaml]\n", ("not ['a.yaml'] (c.yaml:2)", "extends: base.yaml")),
    "mistake-in-extended-file": Case(
        "extends: d.yaml\n" + ADAPT, ("'rnk' in section 'adapt' (d.yaml:2)",), files={"d.yaml": "adapt:\n  rnk: 3\n"}
    ),
    "recipe-missing": Case("extends: recipe://sft-tiny\n", ("no recipe 'sft-tiny'", "Installed recipes")),
    # keys of the core
    "empty-config": Case("", ("'model' is missing (c.yaml)", "Set model")),
    "no-model": Case("seed: 1\n", ("'model' is missing (c.yaml)", "Set model")),
    "model-is-a-word": Case("model: some/model\n", ("'model' is \"some/model\" (c.yaml:1)", "object")),
    "model-without-a-name": Case("model: {dtype: auto}\n", ("'model.name' is missing (c.yaml:1)", "Set model.name")),
    "model-name-empty": Case("model: {name: ''}\n", ("'model.name' is \"\" (c.yaml:1)", "at least 1 character")),
    "model-key-unknown": Case("model: {nmae: m}\n", ("unknown key 'nmae' in section 'model' (c.yaml:1)", "'name'")),
    "dtype-unknown": Case(
        "model: {name: m, dtype: bf16}\n", ("'model.dtype' is \"bf16\" (c.yaml:1)", "'bfloat16'", "frozen weights")
    ),
    "seed-is-text": Case(HEAD + "seed: '3'\n", ("'seed' is \"3\" (c.yaml:2)", "valid integer")),
    "seed-is-a-fraction": Case(HEAD + "seed: 1e3\n", ("'seed' is 1000.0 (c.yaml:2)", "valid integer")),
    "seed-is-negative": Case(HEAD + "seed: -1\n", ("'seed' is -1 (c.yaml:2)", "greater than or equal to 0")),
    "seed-is-empty": Case(HEAD + "seed:\n", ("'seed' is null (c.yaml:2)", "valid integer")),
    "output-is-a-number": Case(HEAD + "output: 3\n", ("'output' is 3 (c.yaml:2)", "valid string")),
    "plugins-is-a-word": Case(HEAD + "plugins: adapt\n", ("'plugins' is \"adapt\" (c.yaml:2)", "valid array")),
    "plugins-holds-a-number": Case(HEAD + "plugins:\n- 3\n", ("'plugins.0' is 3 (c.yaml:3)", "valid string")),
    "weight-is-no-number": Case(HEAD + "loss: {sft: much}\n", ("'loss.sft' is \"much\" (c.yaml:2)", "valid number")),
    "weight-is-infinite": Case(HEAD + "rewards: {a: .inf}\n", ("'rewards.a' is Infinity (c.yaml:2)", "finite")),
    "several-mistakes": Case(
        "model: {nmae: m}\nseed: x\noutput: 3\n",
        ("4 mistakes", "c.yaml:1", "c.yaml:2", "c.yaml:3", "'model.name' is missing"),
    ),
    # sections
    "top-key-misspelt": Case(
        HEAD + "ouput: x\n", ("unknown key 'ouput' at the top of the config (c.yaml:2)", "'output'")
    ),
    "section-misspelt": Case(
        ADAPT + "adpat: {rank: 3}\n",
        ("unknown key 'adpat' at the top of the config (c.yaml:3)", "'adapt'", "pip install"),
    ),
    "section-of-nothing": Case(
        HEAD + "zzz: {}\n", ("unknown key 'zzz'", "Known:", "plugins", "pip install 'pegbox[zzz]'")
    ),
    "section-not-listed": Case(
        HEAD + "adapt: {rank: 3}\n", ("'adapt' (c.yaml:2)", "not active", "Add adapt to plugins")
    ),
    "section-of-a-plugin-without-settings": Case(
        HEAD + "plugins: [mute]\nmute: {x: 1}\n", ("'mute' has no settings", "(c.yaml:3)", "Remove the section 'mute'")
    ),
    "section-is-a-number": Case(ADAPT + "adapt: 3\n", ("'adapt' is 3 (c.yaml:3)", "an object")),
    "key-misspelt": Case(
        ADAPT + "adapt:\n  rank: 3\n  learning_rte: 1e-4\n",
        ("'learning_rte' in section 'adapt' (c.yaml:5)", "'learning_rate'"),
    ),
    "rank-too-small": Case(
        ADAPT + "adapt: {rank: 0}\n", ("'adapt.rank' is 0 (c.yaml:3)", "greater than or equal to 1")
    ),
    "rate-is-text": Case(
        ADAPT + "adapt: {learning_rate: '2e-4'}\n",
        ("'adapt.learning_rate' is \"2e-4\" (c.yaml:3)", "valid number", "Step size."),
    ),
    "flag-is-yes": Case(ADAPT + "adapt: {merge: yes}\n", ("'adapt.merge' is \"yes\" (c.yaml:3)", "valid boolean")),
    "inner-key-missing": Case(
        ADAPT + "adapt:\n  sources:\n  - path: a\n  - {}\n",
        ("'adapt.sources.1.path' is missing (c.yaml:6)", "File of rows."),
    ),
    "inner-key-misspelt": Case(
        ADAPT + "adapt:\n  sources:\n  - pth: a\n    path: b\n",
        ("'pth' in section 'adapt.sources.0' (c.yaml:5)", "'path'"),
    ),
    "fields-that-clash": Case(
        ADAPT + "adapt: {rank: 64, merge: true}\n",
        ("adapt: rank 64 cannot be merged", "Set rank to 32 or less", "(c.yaml:3)"),
    ),
    # plugins
    "plugin-not-installed": Case(
        HEAD + "plugins: [adpt]\n", ("'adpt' is not installed", "Did you mean 'adapt'", "pip install pegbox-adpt")
    ),
    "plugin-twice": Case(
        HEAD + "plugins: [mute, mute]\n",
        ("two plugins are named 'mute'", "if it is one plugin listed twice, remove one"),
    ),
    "plugin-of-two-distributions": Case(
        HEAD + "plugins: [twin]\n", ("twin-1 1.0 and twin-2 1.0", "pip uninstall twin-2")
    ),
    "plugin-of-another-core": Case(
        HEAD + "plugins: [stale]\n",
        ("'stale' (dist-stale 0.3) needs pegbox-core <0.1", "pip install --upgrade dist-stale"),
    ),
    "plugin-that-cannot-be-imported": Case(
        HEAD + "plugins: [cracked]\n", ("'cracked' (dist-cracked 1.0)", "OSError: no gpu", "cracked_code.py:1")
    ),
    "plugin-without-a-class": Case(HEAD + "plugins: [hollow]\n", ("'hollow' (dist-hollow 1.0)", "no class Plugin")),
    "plugin-that-breaks-a-rule": Case(
        HEAD + "plugins: [unruly]\n", ("'unruly' (dist-unruly 1.0), hook build_loss", "'model' has a default")
    ),
    "local-plugin-missing": Case(
        HEAD + "plugins: [./mne.py]\n",
        ("'./mne.py' does not exist", "'./mine.py'"),
        files={"mine.py": "class Plugin: ..."},
    ),
    "local-plugin-without-a-class": Case(
        HEAD + "plugins: [./mine.py]\n", ("'mine' (file mine.py)", "no class Plugin"), files={"mine.py": "x = 1"}
    ),
    "local-plugin-with-an-error": Case(
        HEAD + "plugins: [./mine.py]\n", ("NameError", "(mine.py:2)"), files={"mine.py": "x = 1\ny = z\n"}
    ),
    "local-plugin-named-like-the-core": Case(
        HEAD + "plugins: [./seed.py]\n", ("'seed'", "file seed.py", "Rename"), files={"seed.py": "class Plugin: ..."}
    ),
    # owners
    "two-owners": Case(
        HEAD + "plugins: [sgd, muon]\n",
        ("2 plugins own build_optimizer", "'sgd' (dist-sgd 1.0)", "'muon' (dist-muon 1.0)", "use:"),
        silent=("`loss`",),
    ),
    "two-losses": Case(
        HEAD + "plugins: [twoloss, another]\n", ("2 plugins own build_loss", "unless the config weighs them")
    ),
    "plugin-of-a-name-that-is-not-near": Case(
        HEAD + "plugins: [wandb]\n", ("'wandb' is not installed", "Installed:", "reward"), silent=("Did you mean",)
    ),
    "use-of-an-unknown-hook": Case(
        HEAD + "plugins: [sgd]\nuse: {build_optimiser: sgd}\n", ("'use' names build_optimiser", "'build_optimizer'")
    ),
    "use-of-a-plugin-that-does-not-own-it": Case(
        HEAD + "plugins: [sgd, mute]\nuse: {build_optimizer: mute}\n", ("'mute' does not own build_optimizer", "sgd")
    ),
    "owner-missing": Case(
        HEAD + "plugins: [sgd]\n", ("no active plugin owns load_processor", "pegbox plugins"), ("run", "c.yaml")
    ),
    "format-missing": Case(
        "model: {name: m, format: gguf}\nplugins: [./whole.py]\n",
        ("no active plugin owns load_model[gguf]", "transformers"),
        ("run", "c.yaml"),
    ),
    # the folder of a run
    "output-taken": Case(
        HEAD + "plugins: [./whole.py]\noutput: out\n",
        ("out already holds a run", "resume=auto", "without one it begins anew", "out-2"),
        ("run", "c.yaml"),
        {"out/run.json": "{}"},
    ),
    "output-of-something-else": Case(
        HEAD + "plugins: [./whole.py]\noutput: out\n",
        ("out holds other files", "out-2"),
        ("run", "c.yaml"),
        {"out/thesis.tex": ""},
    ),
    "output-is-a-file": Case(
        HEAD + "plugins: [./whole.py]\noutput: out\n", ("out is a file",), ("run", "c.yaml"), {"out": ""}
    ),
    "resume-of-nothing": Case(
        HEAD + "plugins: [./whole.py]\n",
        ("resume=step-3, but", "holds no run", "resume=auto"),
        ("run", "c.yaml", "resume=step-3"),
    ),
    "resume-of-an-unknown-checkpoint": Case(
        HEAD + "plugins: [./whole.py]\noutput: out\n",
        ("no checkpoint 'step-3'", "none"),
        ("run", "c.yaml", "resume=step-3"),
        {"out/run.json": "{}"},
    ),
}

ADAPT_CODE = """
from typing import Literal
from pydantic import model_validator
from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import ConfigSection

class Source(Section):
    path: str = setting(..., "File of rows.")

class Adapt(Section):
    rank: int = setting(8, "Rank of the update.", ge=1)
    learning_rate: float = setting(1e-4, "Step size.")
    kind: Literal["sigmoid", "hinge"] | dict[str, float] = setting("hinge", "One kind, or several with weights.")
    merge: bool = setting(False, "Merge at the end.")
    sources: tuple[Source, ...] = setting((), "Where rows come from.")

    @model_validator(mode="after")
    def _merging(self):
        if self.merge and self.rank > 32:
            raise ValueError(f"rank {self.rank} cannot be merged. Set rank to 32 or less")
        return self

class Plugin:
    @hookimpl
    def register_config(self):
        return ConfigSection(schema=Adapt)
"""


@pytest.fixture
def market(site, whole: Path) -> Path:
    """A folder with a plugin that owns a whole run, and several installed plugins, some of them bad."""
    site.install("dist-adapt", plugins={"adapt": "adapt_code:Plugin"}, files={"adapt_code.py": ADAPT_CODE})
    site.plugin("mute")
    site.plugin("reward")
    for name in ("twoloss", "another"):
        site.plugin(name, "@hookimpl\ndef build_loss(self, ctx):\n    return 1")
    for name in ("sgd", "muon"):
        site.plugin(name, "@hookimpl\ndef build_optimizer(self, ctx):\n    return 1")
    for number in (1, 2):
        site.install(f"twin-{number}", plugins={"twin": f"twin_{number}:Plugin"})
    site.plugin("stale", version="0.3", requires=("pegbox-core<0.1",))
    site.install(
        "dist-cracked", plugins={"cracked": "cracked_code:Plugin"}, files={"cracked_code.py": "raise OSError('no gpu')"}
    )
    site.install("dist-hollow", plugins={"hollow": "hollow_code:Plugin"}, files={"hollow_code.py": ""})
    site.plugin("unruly", "@hookimpl\ndef build_loss(self, ctx, model=None):\n    return 1")
    (whole / "c.yaml").unlink()
    return whole


def write(folder: Path, case: Case) -> None:
    files = {**case.files, **({} if case.config is None else {"c.yaml": case.config})}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mistake_ends_with_2_and_words_that_teach(market: Path, pegbox, case: Case) -> None:
    write(market, case)
    ended = pegbox(*case.typed)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    for part in case.says:
        assert part in ended.err
    assert not [part for part in case.silent if part in ended.err]
    assert "runs" not in {path.name for path in market.iterdir()}, "nothing is made before the input is right"


@pytest.mark.parametrize("name", ["key-misspelt", "tab", "plugin-that-cannot-be-imported", "output-taken"])
def test_in_a_process_of_its_own_it_ends_the_same(market: Path, site, name: str) -> None:
    case = CASES[name]
    write(market, case)
    environment = {**os.environ, "PYTHONPATH": str(site.folder), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "pegbox", *case.typed]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
    for part in case.says:
        assert part in ended.stderr


def test_what_a_message_says_to_type_is_right(market: Path, pegbox) -> None:
    write(market, CASES["output-taken"])
    said = pegbox("run", "c.yaml").err
    override = next(word for word in said.split() if word.startswith("output="))
    assert pegbox("run", "c.yaml", override.rstrip(".")).code == 0
    assert (market / "out-2/model").is_file()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("EOFError('cut off')", 1, ("Traceback", "EOFError: cut off", "in plugin 'whole'")),
        ("KeyboardInterrupt", 130, ("Interrupted.", "resume=auto")),
    ],
)
def test_what_typer_would_keep_silent_about_is_said(market: Path, error: str, code: int, says: tuple[str, ...]) -> None:
    write(market, Case(HEAD + "plugins: [./whole.py]\n", ()))
    hook = f"    @hookimpl\n    def load_processor(self):\n        raise {error}\n"
    body = (market / "whole.py").read_text().replace('"load_processor", ', "")
    (market / "whole.py").write_text(body.replace("class Plugin:\n", f"class Plugin:\n{hook}"))
    command = [sys.executable, "-m", "pegbox", "run", "c.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert [part for part in says if part not in ended.stderr] == []
    assert ("Traceback" in ended.stderr) == (code == 1)


# ---- rows, through the plugin that reads them ----


DATA = HEAD + "plugins: [./whole.py, data]\nuse: {build_dataset: data}\noutput: out\n"
ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
DATA_CASES = {
    "no-section": Case(DATA, ("data",)),
    "file-missing": Case(
        DATA + "data: {train: [{path: row.jsonl, format: chat}]}\n", ("row.jsonl",), files={"rows.jsonl": ROW}
    ),
    "path-missing": Case(DATA + "data: {train: [{format: chat}]}\n", ("data.train.0.path", "c.yaml:5")),
    "path-is-a-number": Case(
        DATA + "data: {train: [{path: 3, format: chat}]}\n", ("data.train.0.path", "3", "c.yaml:5")
    ),
    "key-misspelt": Case(DATA + "data: {trian: []}\n", ("'trian'", "c.yaml:5", "'train'")),
}


@pytest.mark.skipif("data" not in discover(), reason="needs pegbox-data")
@pytest.mark.parametrize("case", DATA_CASES.values(), ids=DATA_CASES)
def test_a_mistake_about_rows_ends_with_2_and_words_that_teach(market: Path, pegbox, case: Case) -> None:
    write(market, case)
    ended = pegbox("run", "c.yaml")
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    for part in case.says:
        assert part in ended.err
