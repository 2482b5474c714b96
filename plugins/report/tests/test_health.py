"""Each rule speaks when it should, stays silent on a healthy run, and a plugin can add one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from example_run import metrics, write_run
from pegbox.errors import PluginError
from pegbox_report.command import report
from pegbox_report.health import MEASURES, MISSING, Rule, examine, rule_of
from pegbox_report.rules import BUILT_IN
from pegbox_report.run_files import read_run, rules_of


def series(**figures: Sequence[float | None]) -> list[dict[str, Any]]:
    length = max(len(values) for values in figures.values())
    return [
        {"kind": "train", "step": i + 1, **{key: values[i] for key, values in figures.items() if i < len(values)}}
        for i in range(length)
    ]


def raised(rows: list[dict[str, Any]]) -> set[str]:
    return {finding.rule.name for finding in examine(rows, BUILT_IN) if finding.raised}


def test_a_healthy_run_raises_nothing() -> None:
    assert raised(metrics()) == set()


FALLING = [2 - 0.02 * step for step in range(40)]
SICK = {
    "loss-not-finite": series(loss=[2.0, None, 1.9]),
    "first-loss-high": series(loss=[10.8, 9.0, 7.0]),
    "first-loss-low": series(loss=[0.01, 0.01]),
    "loss-flat": series(loss=[2.0 + 0.01 * (step % 3) for step in range(60)]),
    "loss-near-zero": series(loss=[2.0, 1.0, *[0.001] * 20]),
    "gradient-zero": series(loss=FALLING, grad_norm=[1.0, 0.0, 1.0]),
    "gradient-large": series(loss=FALLING, grad_norm=[1.0, 250.0]),
    "gradient-spike": series(loss=FALLING, grad_norm=[*[1.0] * 20, 30.0]),
    "gradient-high-at-the-end": series(loss=FALLING, grad_norm=[12.0 + step for step in range(20)]),
    "learning-rate-zero": series(loss=FALLING, learning_rate=[0.0] * 40),
    "eval-diverges": series(loss=FALLING, eval_loss=[2.0, 1.5, 1.4, 1.5, 1.7]),
    "slower": series(loss=FALLING, tokens_per_s=[*[1000.0] * 30, *[400.0] * 10]),
}


@pytest.mark.parametrize("name", [rule.name for rule in BUILT_IN])
def test_each_rule_finds_its_own_illness_and_no_other_one(name: str) -> None:
    assert raised(SICK[name]) - {"first-loss-low", "loss-near-zero"} == {name} - {"first-loss-low", "loss-near-zero"}
    assert name in raised(SICK[name])
    finding = next(one for one in examine(SICK[name], BUILT_IN) if one.rule.name == name)
    assert "{" not in finding.says
    assert finding.rule.advice


def test_rules_say_nothing_about_figures_that_are_not_there() -> None:
    assert all(finding.value is None and not finding.raised for finding in examine([], BUILT_IN))
    assert raised(series(loss=[2.0, 2.0])) == set()


@pytest.mark.parametrize(
    ("measure", "says", "expected"),
    [
        ("zeros", "zero in {value} of the steps", "zero in 50% of the steps"),
        ("last", "the loss is {value}", "the loss is 0.333"),
        ("last", "{value:.0%} of the pairs", "33% of the pairs"),
    ],
)
def test_shares_are_told_in_per_cent(measure: str, says: str, expected: str) -> None:
    rule = Rule("one", metric="loss", measure=measure, says=says, advice="", below=2.0, window=1)
    (finding,) = examine(series(loss=[0.0, 0.0, 1.0, 1 / 3]), [rule])
    assert finding.says == expected


def test_only_rules_that_have_figures_are_said_to_hold(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report(write_run(tmp_path / "dead", []), output=None)
    assert f"0 of 0 health rules hold; {len(BUILT_IN)} others have no figures yet" in capsys.readouterr().out
    report(write_run(tmp_path / "short", series(loss=[2.0, 1.9])), output=None)
    assert "3 of 3 health rules hold; " in capsys.readouterr().out


def test_rules_are_complete() -> None:
    assert len({rule.name for rule in BUILT_IN}) == len(BUILT_IN)
    for rule in BUILT_IN:
        assert rule.measure in (*MEASURES, MISSING)
        assert (rule.above is None) != (rule.below is None)


PLUGIN = """
from pegbox.hooks import hookimpl
from pegbox.types import Item

class Plugin:
    @hookimpl
    def register_items(self):
        target = {"metric": "entropy", "measure": "last", "below": 0.01, "plugins": ["mine"],
                  "says": "the entropy fell to {value}", "advice": "Lower the learning rate."}
        return [Item(kind="health_rule", name="entropy-collapse", target=target)]
"""


def test_a_plugin_adds_a_rule_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_run(tmp_path / "run", series(loss=FALLING, entropy=[0.5, *[0.001] * 30]))
    plugin = tmp_path / "mine.py"
    plugin.write_text(textwrap.dedent(PLUGIN))
    (folder / "config.yaml").write_text(f"model: {{name: m}}\nplugins: [{plugin}]\n")
    assert "entropy-collapse" not in {rule.name for rule in rules_of(read_run(folder))}
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(record.replace('"name": "hf"', '"name": "mine"'))
    report(folder, output=None)
    assert "warning: the entropy fell to 0.001" in capsys.readouterr().out
    assert "The entropy fell to 0.001" in (folder / "report.html").read_text()


def test_rules_that_cannot_be_read_are_missed_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("model: {name: m}\nplugins: [not-there]\n")
    assert {rule.name for rule in rules_of(read_run(folder))} == {rule.name for rule in BUILT_IN}
    assert "are left out: plugin 'not-there' is not installed" in caplog.text


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"metrik": "loss"}, "metrik"),
        ({"metric": "loss", "measure": "mean", "says": "", "advice": ""}, "mean"),
        (3, "3"),
    ],
)
def test_a_rule_that_is_none_names_its_mistake(target: object, says: str) -> None:
    with pytest.raises(PluginError, match=says):
        rule_of("mine", target)
