"""The plan: who does what and why, as stable data; what its digest tells apart; and the model with its patches."""

from __future__ import annotations

import json
from collections.abc import Generator

import pytest
from pegbox import __version__, hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, PatchError, PluginError, RunError
from pegbox.hooks import hookimpl
from pegbox.plan import NEEDED, Plan, compose, plan_model, require_training
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, Item, ModelOptions, ModelRequest


class Settings(Section):
    rank: int = setting(8, "Rank.")
    weights: dict[str, float] = setting({}, "Weights.")


class Configured:
    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=Settings)

    @hookimpl
    def configure_model(self) -> ModelOptions:
        return ModelOptions()


class Owner:
    @hookimpl
    def build_runtime(self) -> object:
        return "runtime"

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="model_format", name=form, target=self) for form in ("x", "y")]

    @hookimpl
    def load_model(self, request: ModelRequest) -> object:
        return request


class Refiner:
    @hookimpl(wrapper=True)
    def build_runtime(self) -> Generator[None, object, object]:
        return (yield)


ALL = {"refiner": Refiner(), "configured": Configured(), "owner": Owner()}


def config(**changes: object) -> dict[str, object]:
    return {"model": {"name": "m"}, "plugins": list(ALL), "configured": {"rank": 4}, **changes}


def planned(source: object, *overrides: str, **instances: object) -> Plan:
    return compose(source, overrides, instances={**ALL, **instances}).plan


# ---- what it says ----


def test_the_plan_names_every_hook_that_is_answered_in_the_order_of_a_run() -> None:
    jobs = {job.hook: job for job in planned(config()).jobs}
    order = [name for name in hooks.SPECS for job in jobs if job.split("[")[0] == name]
    assert list(jobs) == [
        "register_config",
        "register_items",
        "build_runtime",
        "configure_model",
        "load_model[x]",
        "load_model[y]",
    ]
    assert [job.split("[")[0] for job in jobs] == order
    assert (jobs["build_runtime"].plugins, jobs["build_runtime"].wrappers) == (("owner",), ("refiner",))
    assert jobs["load_model[y]"].plugins == ("owner",)
    assert jobs["configure_model"].plugins == ("configured",)


def test_the_plan_says_why_a_plugin_owns_a_hook() -> None:
    plan = planned(
        config(plugins=[*ALL, "rival"], use={"build_runtime": "rival", "load_model": "owner"}), rival=Owner()
    )
    found = {job.hook: (job.plugins, job.reason) for job in plan.jobs}
    assert found["build_runtime"] == (("rival",), "chosen by use")
    assert found["load_model[x]"] == (("owner",), "chosen by use")
    assert {job.reason for job in planned(config()).jobs if job.hook == "build_runtime"} == {"the only one"}


def test_the_plan_as_json_holds_versions_plugins_hooks_and_every_key_with_its_origin() -> None:
    plan = planned(config())
    data = json.loads(json.dumps(plan.to_json()))
    assert data["pegbox"] == __version__
    assert [plugin["name"] for plugin in data["plugins"]] == list(ALL)
    assert {entry["hook"] for entry in data["hooks"]} == {job.hook for job in plan.jobs}
    assert {"key": "configured.rank", "value": 4, "from": "python"} in data["config"]
    assert {"key": "seed", "value": 0, "from": "default"} in data["config"]
    assert "patches" not in data


# ---- digest ----


def test_the_same_config_gives_the_same_plan_and_digest() -> None:
    one, two = planned(config()), planned(config())
    assert json.dumps(one.to_json()) == json.dumps(two.to_json())
    assert one.digest() == two.digest()


def test_the_digest_does_not_depend_on_where_a_value_came_from(here) -> None:
    from_python = planned(config()).digest()
    assert planned(config(configured={}), "configured.rank=4").digest() == from_python
    assert planned(config(seed=0)).digest() == from_python
    (here / "base.yaml").write_text("configured: {rank: 4}\n")
    (here / "c.yaml").write_text(
        "extends: base.yaml\n# a comment\nplugins: [refiner, configured, owner]\nmodel: {name: m}"
    )
    assert planned("c.yaml").digest() == from_python


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    one = planned(config(rewards=weights, configured={"rank": 4, "weights": weights}))
    backwards = dict(reversed(weights.items()))
    two = planned({"rewards": backwards, **config(configured={"weights": backwards, "rank": 4})})
    assert one.digest() == two.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model": {"name": "other"}},
        {"configured": {"rank": 5}},
        {"configured": {}},
        {"configured": {"rank": 4, "weights": {"a": 1.0}}},
        {"plugins": ["configured", "refiner", "owner"]},
        {"plugins": ["configured", "owner"]},
        {"output": "elsewhere"},
    ],
    ids=str,
)
def test_the_digest_changes_with_any_value_plugin_or_order(changes: dict[str, object]) -> None:
    assert planned(config(**changes)).digest() != planned(config()).digest()


def test_the_digest_changes_with_the_owner() -> None:
    listed = config(plugins=[*ALL, "rival"])
    digests = {
        planned({**listed, "use": {"build_runtime": owner, "load_model": "owner"}}, rival=Owner()).digest()
        for owner in ("owner", "rival")
    }
    assert len(digests) == 2


def test_the_digest_changes_with_the_version_of_a_plugin(site, tmp_path) -> None:
    listed = {"model": {"name": "m"}, "plugins": ["alpha"]}
    site.plugin("alpha", version="1.0")
    before = compose(listed).plan.digest()
    folder = site.folder / "dist_alpha-1.0.dist-info"
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dist-alpha\nVersion: 1.1\n")
    folder.rename(site.folder / "dist_alpha-1.1.dist-info")
    assert compose(listed).plan.plugins == (("alpha", "dist-alpha 1.1"),)
    assert compose(listed).plan.digest() != before


def test_the_digest_changes_with_the_source_of_a_local_plugin(here) -> None:
    source = "class Plugin:\n    pass\n"
    (here / "mine.py").write_text(source)
    (here / "c.yaml").write_text("model: {name: m}\nplugins: [./mine.py]\n")
    before = compose("c.yaml").plan
    (here / "mine.py").write_text(source + "# more")
    after = compose("c.yaml").plan
    assert after.digest() != before.digest()
    with pytest.raises(RunError, match=r"ranks \[1\] hold another plan"):
        after.agree(Ranks(before, after))
    (here / "mine.py").write_text(source)
    assert compose("c.yaml").plan == before


# ---- what a section says of the rest of the run ----


class Named(Section):
    name: str = setting("one", "An item of kind `thing`.")

    def check(self, ctx: Context) -> None:
        if self.name not in ctx.items("thing"):
            raise ConfigError(f"naming.name is '{self.name}', and there is {', '.join(ctx.items('thing'))}")


class Naming:
    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=Named)


class Things:
    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="thing", name=name, target=self) for name in ("one", "two")]


def test_a_section_is_checked_beside_what_other_plugins_declare(composed) -> None:
    plugins = {"naming": Naming(), "things": Things()}
    assert composed(plugins, naming={"name": "two"}).section(Named).name == "two"
    with pytest.raises(ConfigError, match=r"naming\.name is 'three', and there is one, two"):
        composed(plugins, naming={"name": "three"})


# ---- ranks ----


class Ranks:
    """A runtime of several ranks that hold these plans."""

    def __init__(self, *plans: Plan) -> None:
        self.digests = [plan.digest() for plan in plans]

    def gather_objects(self, value: object) -> list[object]:
        assert value in self.digests
        return list(self.digests)


def test_ranks_with_one_plan_agree() -> None:
    plans = [planned(config()), planned(config(configured={}), "configured.rank=4"), planned(config())]
    for plan in plans:
        plan.agree(Ranks(*plans))


def test_a_rank_with_another_plan_stops_the_run_on_every_rank() -> None:
    plans = [planned(config()), planned(config()), planned(config(seed=1)), planned(config(seed=1))]
    for plan in plans:
        with pytest.raises(RunError, match=r"ranks \[2, 3\] hold another plan than rank 0") as error:
            plan.agree(Ranks(*plans))
        assert error.value.exit_code == 1
        assert "pegbox plan" in error.value.next


# ---- what a training run cannot do without ----


def test_a_run_without_an_owner_that_it_needs_is_refused_before_it_starts(composed) -> None:
    class Everything:
        @hookimpl
        def register_items(self) -> list[Item]:
            return [Item(kind=kind, name="x", target=self) for kind in ("model_format", "export_format")]

    def implement(hook: str) -> object:
        @hookimpl
        def method(ctx: Context) -> object:
            return hook

        method.__name__ = hook
        return staticmethod(method)

    for missing in NEEDED:
        methods = {hook: implement(hook) for hook in NEEDED if hook != missing}
        plugin = type("AllButOne", (Everything,), methods)()
        with pytest.raises(PluginError, match=f"no active plugin owns {missing}"):
            require_training(composed({"most": plugin}))
    plugin = type("All", (Everything,), {hook: implement(hook) for hook in NEEDED})()
    require_training(composed({"all": plugin}))
    with pytest.raises(ConfigError, match="'rewards' has no effect on this run"):
        require_training(composed({"all": plugin}, rewards={"a": 1.0}))


# ---- the model ----


TINY = """
from pegbox.hooks import hookimpl
from pegbox.types import Item, Model, ModulePatch, SeamChange
import tiny_state

class Plugin:
    @hookimpl
    def register_items(self):
        return [Item(kind="model_format", name="transformers", target=self)]

    @hookimpl
    def load_model(self, request):
        import torch
        assert request.meta
        with torch.device("meta"):
            module = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8), "down": torch.nn.Linear(8, 4, bias=False)})
        module["down"].requires_grad_(False)
        tiny_state.modules.append(module)
        return Model(module=module, name=request.name, base=request.name, format="transformers", compute=None,
                     traits=frozenset({"causal", "moe"}))

    @hookimpl
    def patch_attention(self, model):
        seam = SeamChange(seam="tiny", holder=tiny_state, attribute="chosen", value="fast", calls=lambda: 0)
        return [ModulePatch(slot="attention", target="up", replace=lambda old: seam, reason="a faster way up")]

    @hookimpl
    def patch_modules(self, model, stage):
        if stage != "adapted":
            return []
        return [ModulePatch(slot="mlp", target=tiny_state.target, replace=lambda old: lambda x: x, reason="less work")]
"""


@pytest.fixture
def tiny(here, site):
    """A config whose local plugin builds a model on the meta device, and a module that would show traces of patches."""
    pytest.importorskip("torch")
    state = "modules = []\nchosen = 'eager'\ntarget = 'down'\n"
    site.install("dist-tiny-state", files={"tiny_state.py": state})
    import tiny_state

    (here / "tiny.py").write_text(TINY)
    (here / "c.yaml").write_text("model: {name: some/tiny}\nplugins: [./tiny.py]\n")
    return tiny_state


def test_the_plan_of_a_model_tells_sizes_traits_and_patches_and_leaves_no_patch_behind(tiny) -> None:
    ctx = compose("c.yaml")
    plan = plan_model(ctx)
    assert plan.model == {"name": "some/tiny", "traits": ["causal", "moe"], "parameters": 72, "trainable": 40}
    told = [(entry["plugin"], entry["slot"], entry["kind"], entry["modules"]) for entry in plan.patches]
    assert told == [("tiny", "attention", "seam", ["up"]), ("tiny", "mlp", "forward", ["down"])]
    assert json.loads(json.dumps(plan.to_json()))["patches"][1]["reason"] == "less work"
    (module,) = tiny.modules
    assert all(parameter.is_meta for parameter in module.parameters())
    assert "forward" not in vars(module["down"])
    assert tiny.chosen == "eager"
    assert ctx.kernel.patches.applied == []


def test_a_plan_that_fails_halfway_leaves_no_patch_behind_either(tiny) -> None:
    tiny.target = "nothing"
    with pytest.raises(PatchError, match="matches no module"):
        plan_model(compose("c.yaml"))
    assert tiny.chosen == "eager"


def test_the_command_prints_the_patches(tiny, pegbox) -> None:
    ended = pegbox("plan", "c.yaml", "--model")
    assert ended.code == 0
    for part in ("Patches", "less work", "a faster way up", "causal", "moe", "72"):
        assert part in ended.out
    ended = pegbox("plan", "c.yaml", "--model", "--json")
    assert [entry["slot"] for entry in json.loads(ended.out)["patches"]] == ["attention", "mlp"]
