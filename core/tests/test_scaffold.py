"""What `make_plugin` makes: for every hook a package that is clean, conforms and works; a run can be made of them."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import pytest
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.hooks import SPECS
from pegbox.rollouts import RolloutRequest, Sampling, WeightUpdate
from pegbox.scaffold import TEMPLATES, make_plugin
from pegbox.testing import run_config, tiny_batches, tiny_model, tiny_processor
from pegbox.types import ExportRequest, Item, ModelRequest

if TYPE_CHECKING:
    from conftest import Site
    from pegbox.context import Context

NAMES = ("x1", "sample-reward", "a-rather-long-name-indeed")


def name_of(hook: str) -> str:
    return f"try-{hook.replace('_', '-')}"


@pytest.fixture
def install(site: Site, tmp_path: Path) -> Callable[..., Path]:
    """Make a plugin for a hook and install its wheel; the folder of the package."""

    def make_and_install(hook: str, name: str = "") -> Path:
        name = name or name_of(hook)
        make_plugin(name, hook, tmp_path)
        project = tmp_path / f"pegbox-{name}"
        site.install_project(project)
        return project

    return make_and_install


def test_every_hook_has_a_template_and_every_template_a_hook() -> None:
    assert {folder.name for folder in TEMPLATES.joinpath("hooks").iterdir()} == set(SPECS)


def test_every_template_is_clean_whatever_the_plugin_is_called(tmp_path: Path) -> None:
    for name in NAMES:
        for hook in SPECS:
            make_plugin(name, hook, tmp_path / f"{name}-{hook}")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    left = [path for path in tmp_path.rglob("*.*") if re.search(r"\$\{?[a-zA-Z]|TODO", path.read_text())]
    assert left == [], "every word is filled in, and nothing is left to do"


@pytest.mark.parametrize("hook", SPECS)
def test_every_template_conforms(hook: str, install: Callable[..., Path], tmp_path: Path) -> None:
    project = install(hook)
    module = runpy.run_path(str(project / "tests" / "test_conformance.py"))
    (kit,) = (value for name, value in module.items() if name.startswith("Test"))
    for number, test in enumerate(name for name in dir(kit) if name.startswith("test_")):
        method = getattr(kit(), test)
        arguments = [tmp_path / str(number)] if inspect.signature(method).parameters else []
        method(*arguments)


def test_the_wheel_of_the_core_ships_every_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hatchling.build

    core = Path(__file__).parents[1]
    monkeypatch.chdir(core)
    shipped = set(ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))).namelist())
    templates = {str(path.relative_to(core)) for path in core.glob("pegbox/scaffold/templates/**/*.*")}
    assert templates
    assert templates <= shipped


@pytest.mark.packaging
@pytest.mark.parametrize("hook", ["score_rollouts", "build_loss"])
def test_a_template_is_installed_by_pip_and_tested_by_pytest(hook: str, tmp_path: Path) -> None:
    make_plugin("sample", hook, tmp_path)
    project, target = tmp_path / "pegbox-sample", tmp_path / "target"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, str(project)], check=True)
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, str(target), "-q", "-p", "no:cacheprovider", str(project)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout


# ---- names ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pegbox-tally", "Type: pegbox plugins new tally --hook on_event"),
        ("My Tally", "Type: pegbox plugins new my-tally --hook on_event"),
        ("my_tally", "is no name for a plugin"),
        ("2fast", "begins with a letter"),
        ("", "'' is no name for a plugin"),
        ("plugins", "'plugins' is a key of the core"),
        ("extends", "is a key of the core"),
        ("core", "'core' is taken by pegbox-core 0.1.0, which is installed"),
        ("taken", "'taken' is taken by dist-taken 1.0, which is installed"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_made(
    name: str, message: str, site: Site, tmp_path: Path
) -> None:
    site.plugin("taken")
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_plugin(name, "on_event", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_hook_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no hook 'score_rollout'\nDid you mean 'score_rollouts'"):
        make_plugin("tally", "score_rollout", tmp_path)


def test_it_says_what_was_made_and_what_to_type_next(tmp_path: Path) -> None:
    said = make_plugin("tally", "on_event", tmp_path)
    package = tmp_path / "pegbox-tally"
    assert (package / "pegbox_tally" / "__init__.py").is_file()
    assert f"pip install -e '{package}[testing]'" in said
    assert f"pytest {package}" in said


def test_a_package_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    make_plugin("tally", "on_event", tmp_path)
    readme = tmp_path / "pegbox-tally" / "README.md"
    readme.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        make_plugin("tally", "on_event", tmp_path)
    assert readme.read_text() == "mine"


def test_the_readme_lists_every_setting_with_default_and_unit(tmp_path: Path) -> None:
    make_plugin("tally", "score_rollouts", tmp_path)
    readme = (tmp_path / "pegbox-tally" / "README.md").read_text()
    row = "| `max_tokens` | integer | `256` | tokens | A completion of this length or longer earns nothing. |"
    assert row in readme.partition("<!-- config -->")[2].partition("<!-- /config -->")[0]


# ---- what the templates do ----

STORY = [
    "build_runtime",
    "load_processor",
    "build_dataset",
    "configure_model",
    "load_model",
    "patch_attention",
    "patch_modules",
    "apply_adapters",
    "place_model",
    "build_loss",
    "build_batches",
    "configure_groups",
    "build_optimizer",
    "open_checkpoints",
    "run_training",
    "on_event",
]
STEPS = 12


class Exporter:
    """Takes the format of the scaffolded model, which brings none to write."""

    @hooks.hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="export_format", name=name_of("load_model"), target="")]

    @hooks.hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        return request.folder


@pytest.fixture
def story(install: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A config of a run that is made of scaffolds alone, and keys to change in it."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=257, num_key_value_heads=2, max_position_embeddings=64, **sizes).save_pretrained(
        tmp_path / "shape"
    )
    (tmp_path / "corpus.txt").write_text("one and two\n\ntwo and three\nthree and four\nfour and five\n" * 2)
    for hook in STORY:
        install(hook)
    sections = {
        "build_dataset": {"train": str(tmp_path / "corpus.txt"), "eval": str(tmp_path / "corpus.txt")},
        "apply_adapters": {"pattern": "norm|embed|lm_head|proj"},
        "configure_groups": {"pattern": "norm", "weight_decay": 0.0},
        "build_batches": {"rows": 4, "steps": STEPS},
        "build_optimizer": {"learning_rate": 0.2, "weight_decay": 0.001},
        "run_training": {"log_every": 1, "save_every": 5},
    }

    def config(output: str, **changes: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": {"name": str(tmp_path / "shape"), "format": name_of("load_model")},
            "plugins": [*map(name_of, STORY), "exporter"],
            "output": str(tmp_path / output),
            **{name_of(hook): {**section, **changes.get(hook, {})} for hook, section in sections.items()},
        }

    return config


def logged(folder: Path) -> list[dict[str, float]]:
    lines = (folder / f"{name_of('on_event')}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_made_of_scaffolds_alone_trains(story: Callable[..., dict[str, Any]]) -> None:
    result = run_config(story("run"), instances={"exporter": Exporter()})
    metrics = logged(result.folder)
    assert result.outcome.reason == "finished"
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert [path.name for path in sorted((result.folder / "checkpoints").iterdir())] == ["step-10", "step-12"]
    assert result.foreign_changes == ()
    patched = {applied.patch.slot for applied in result.ctx.kernel.patches.applied}
    assert patched == {"attention", "norm"}
    assert set(STORY) <= set(result.hooks())
    order = [hook for hook in dict.fromkeys(result.hooks()) if hook in STORY]
    assert order.index("build_runtime") < order.index("load_model") < order.index("patch_attention")
    assert order.index("apply_adapters") < order.index("place_model") < order.index("run_training")


def test_a_run_of_scaffolds_that_is_resumed_ends_like_one_that_was_not(story: Callable[..., dict[str, Any]]) -> None:
    import torch

    class Stopper(Exporter):
        """Asks to stop after a step."""

        @hooks.hookimpl
        def on_event(self, event: Any) -> Any:
            from pegbox.events import Signal, Stepped

            return Signal.STOP if isinstance(event, Stepped) and event.step == 7 else Signal.NONE

    whole = run_config(story("whole"), instances={"exporter": Exporter()})
    first = run_config(story("parts"), instances={"exporter": Stopper()})
    assert (first.outcome.reason, first.outcome.step) == ("stopped", 7)
    rest = run_config(story("parts"), ["resume=auto"], instances={"exporter": Exporter()})
    assert rest.outcome.step == STEPS
    assert logged(rest.folder) == logged(whole.folder)
    states = [torch.load(r.folder / "checkpoints/step-12/model-and-optimizer.pt") for r in (whole, rest)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def composed(hook: str, compose_config: Callable[..., Context], **section: Any) -> Context:
    """A context with the plugin that was made for a hook."""
    name = name_of(hook)
    config = {"model": {"name": "tiny"}, "plugins": [name]} | ({name: section} if section else {})
    ctx = compose_config(config)
    ctx.runtime, ctx.processor, ctx.total_steps = _one_rank(), tiny_processor(), None
    return ctx


def _one_rank() -> Any:
    from pegbox.testing import FakeRuntime

    return FakeRuntime()


def test_focal_loss_without_focus_is_torchs_cross_entropy(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    import torch

    install("build_loss")
    model, (batch, _) = tiny_model(), tiny_batches()
    outputs = model.compute(model.module, batch, frozenset({"logps", "logits"}))
    targets = batch.targets_BT.flatten()[batch.trained_N]
    contexts = [composed("build_loss", compose_config, gamma=gamma) for gamma in (0.0, 2.0)]
    plain, focused = (ctx.call(hooks.build_loss, ctx, model)(batch, outputs).terms[0] for ctx in contexts)
    wanted = torch.nn.functional.cross_entropy(outputs.logits_NV, targets, reduction="sum")
    torch.testing.assert_close(plain.total, wanted)
    probabilities = outputs.logps_N.exp()
    torch.testing.assert_close(focused.total, -((1 - probabilities) ** 2 * outputs.logps_N).sum())


def patched_logits(ctx: Context, hook: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The logits of a tiny model with eager attention, before and after the patches of a hook."""
    import torch

    model, (batch, _) = tiny_model(attn_implementation="eager"), tiny_batches()
    model.module.to(getattr(torch, dtype))
    needs = frozenset({"logits"})
    with torch.no_grad():
        before = model.compute(model.module, batch, needs).logits_NV
        stage = () if hook == "patch_attention" else ("base",)
        ctx.kernel.patches.apply(model, ctx.each(getattr(hooks, hook), ctx, model, *stage))
        after = model.compute(model.module, batch, needs).logits_NV
    return before, after


def test_a_cap_that_nothing_reaches_changes_nothing_and_a_low_one_does(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    import torch

    install("patch_attention")
    before, after = patched_logits(composed("patch_attention", compose_config, cap=1e4), "patch_attention")
    torch.testing.assert_close(after, before)
    before, after = patched_logits(composed("patch_attention", compose_config, cap=1e-3), "patch_attention")
    assert not torch.allclose(after, before, atol=1e-5)


def test_the_fused_norm_computes_what_transformers_does(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    import torch

    install("patch_modules")
    before, after = patched_logits(composed("patch_modules", compose_config), "patch_modules")
    torch.testing.assert_close(after, before)
    before, after = patched_logits(composed("patch_modules", compose_config), "patch_modules", "bfloat16")
    torch.testing.assert_close(after, before, atol=2e-2, rtol=2e-2)


def test_the_tokenizer_of_bytes_gives_any_text_back(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    install("load_processor")
    ctx = composed("load_processor", compose_config)
    processor = ctx.call(hooks.load_processor, ctx)
    text = "Grüße, 世界! \t\n  x = 1"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer.encode("<end>") == [processor.pad_id] == [256]


def test_the_source_reads_rows_and_says_which_line_is_wrong(install: Callable[..., Path], tmp_path: Path) -> None:
    install("register_items")
    source = import_module("pegbox_try_register_items.source").TryRegisterItemsSource()
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\n1+1=\t2\nbroken\n")
    good, bad = source.read(tmp_path / "rows.tsv")
    assert (good.line, good.row, good.error) == (2, {"prompt": "1+1=", "completion": "2"}, None)
    assert (bad.line, bad.row) == (3, None)
    assert "1 fields, the header names 2" in str(bad.error)


def test_what_is_generated_is_the_column_and_shorter_is_better(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    install("generate_rollouts")
    install("score_rollouts")
    ctx = composed("generate_rollouts", compose_config)
    rows = ({"answer": "4"}, {"answer": "a long answer"})
    request = RolloutRequest(prompts=((1,), (2,)), columns=rows, samples=2, sampling=Sampling(max_tokens=9))
    batch = ctx.call(hooks.generate_rollouts, ctx, request)
    assert [ctx.processor.tokenizer.decode(r.completion, True) for r in batch.rollouts] == ["4", "4"] + [
        "a long an"
    ] * 2
    assert [rollout.finished for rollout in batch.rollouts] == [True, True, False, False]
    ctx = composed("score_rollouts", compose_config, max_tokens=10)
    ((_, (score,)),) = ctx.each(hooks.score_rollouts, ctx, batch)
    assert score.values_R == pytest.approx((0.8, 0.8, 0.1, 0.1))


def test_synced_weights_and_an_export_hold_the_tensors(
    install: Callable[..., Path], compose_config: Callable[..., Context]
) -> None:
    import torch

    install("sync_weights")
    install("export_model")
    model = tiny_model()
    ctx = composed("sync_weights", compose_config)
    update = WeightUpdate(version=3, kind="full", tensors=model.module.named_parameters())
    ((_, receipt),) = ctx.each(hooks.sync_weights, ctx, update)
    assert receipt.version == 3
    assert f"{sum(p.numel() for p in model.module.parameters())} values" in receipt.evidence
    model.module.model.embed_tokens.requires_grad_(False)
    ctx = composed("export_model", compose_config)
    ctx.folder.mkdir(parents=True, exist_ok=True)
    path = ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=ctx.folder, format=name_of("export_model")))
    saved = torch.load(path, weights_only=True)
    named = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    assert saved.keys() == named.keys()
    assert all(torch.equal(saved[name], named[name]) for name in named)


def test_a_new_model_has_no_weights_on_the_meta_device_and_the_same_ones_each_time_elsewhere(
    story: Callable[..., dict[str, Any]], compose_config: Callable[..., Context]
) -> None:
    import torch

    ctx = compose_config(story("meta"), instances={"exporter": Exporter()})
    request = ModelRequest(name=ctx.config.run.model.name, format=name_of("load_model"), meta=True)
    empty = ctx.call(hooks.load_model, ctx, request).module
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    first, second = (
        ctx.call(hooks.load_model, ctx, ModelRequest(name=request.name, format=request.format)).module for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_notes_are_shown_by_the_plan(install: Callable[..., Path], compose_config: Callable[..., Context]) -> None:
    install("register_config")
    ctx = composed("register_config", compose_config, owner="me", labels=["first"])
    assert ("try-register-config.owner", "me", "python") in [(key, value, str(o)) for key, value, o in ctx.plan.values]
