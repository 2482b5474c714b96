"""Pages of real runs of DPO and GRPO, and the table of completions."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import tiny_learning
from example_run import write_run
from page_reader import NASTY, Read, needs_browser, opened, page_of
from pegbox_report.command import report
from pegbox_report.completions import EACH, LONGEST, MOST_GENERATIONS, read_completions, weights_of
from pegbox_report.health import examine
from pegbox_report.panels import panels_of
from pegbox_report.rules import BUILT_IN
from pegbox_report.run_files import read_run, rules_of
from pegbox_report.series import page_data

ROUGHLY = {"split": "train", "finished": True, "advantage": 0.5}


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pegbox_dpo")
    return tiny_learning.run_dpo(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pegbox_grpo")
    return tiny_learning.run_grpo(tmp_path_factory.mktemp("grpo"))


def charts_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {chart["title"]: chart for chart in json.loads(page_of(folder).figures)["charts"]}


def lines_of(chart: dict[str, Any]) -> dict[str, list[float]]:
    return {one["label"]: one["value"] for one in chart["series"]}


def test_a_run_of_dpo_shows_chosen_beside_rejected(dpo: Path) -> None:
    rows, charts = read_run(dpo).metrics, charts_of(dpo)
    for title, name in (("Rewards of answers", "rewards"), ("Log-probabilities of answers", "logps")):
        wanted = {kind: [row[f"{name}/{kind}"] for row in rows] for kind in ("chosen", "rejected")}
        assert lines_of(charts[title]) == wanted
    for title, key in (("Margin", "rewards/margins"), ("Accuracy", "rewards/accuracies")):
        assert lines_of(charts[title]) == {"train": [row[key] for row in rows]}
    assert list(dict.fromkeys(chart["group"] for chart in charts.values() if chart.get("group"))) == [
        "Preferences",
        "Training",
    ]
    assert charts["Loss"]["note"] == ""
    assert 'id="completions"' not in (dpo / "report.html").read_text()
    assert {"pairs-alike", "margins-negative"} <= {rule.name for rule in rules_of(read_run(dpo))}


def test_a_run_of_grpo_shows_rewards_lengths_ratios_and_seconds(grpo: Path) -> None:
    rows, charts = read_run(grpo).metrics, charts_of(grpo)
    shown = {
        ("Reward", "train"): "reward",
        ("Spread of rewards", "train"): "reward_std",
        ("Groups with one reward", "train"): "frac_reward_zero_std",
        ("vowels", "mean"): "rewards/vowels/mean",
        ("vowels", "deviation"): "rewards/vowels/std",
        ("Length", "mean"): "completions/mean_length",
        ("Length", "longest"): "completions/max_length",
        ("Length", "shortest"): "completions/min_length",
        ("Cut completions", "train"): "completions/clipped_ratio",
        ("Entropy", "train"): "entropy",
        ("Clipped ratios", "all"): "clip_ratio/region_mean",
        ("Trainer over sampler", "mean"): "sampling/importance_sampling_ratio/mean",
        ("Trainer against sampler", "mean"): "sampling/sampling_logp_difference/mean",
        ("Seconds of a generation", "generate"): "generate_s",
        ("Seconds of a generation", "score"): "score_s",
        ("Seconds of a generation", "learn"): "learn_s",
    }
    for (title, label), key in shown.items():
        assert lines_of(charts[title])[label] == [row[key] for row in rows if key in row], title
    assert not {key for key in charts if "/" in key}, "no figure of the run is left without a place"
    assert {"entropy-collapse", "reward-flat"} <= {rule.name for rule in rules_of(read_run(grpo))}


def test_completions_of_a_run_are_on_its_page_with_what_they_were_worth(grpo: Path) -> None:
    run = read_run(grpo)
    written = [json.loads(line) for line in (grpo / "completions.jsonl").read_text().splitlines()]
    assert weights_of(run.record) == {"vowels": 2.0}
    assert {one.step for one in run.completions} == set(range(6))
    for step in range(6):
        worth = sorted((2 * row["rewards"]["vowels"] for row in written if row["step"] == step), reverse=True)
        shown = [one.reward for one in run.completions if one.step == step]
        assert shown == pytest.approx([*worth[:EACH], *worth[-EACH:]])
    text = page_of(grpo).text
    assert "The opposite of" in text
    assert "vowels" in text


def test_runs_without_them_show_none_of_it(tmp_path: Path) -> None:
    read = page_of(write_run(tmp_path / "run"))
    sections = [attributes.get("id") for tag, attributes in read.elements if tag == "section"]
    assert "completions" not in sections
    assert not any(chart.get("group") for chart in json.loads(read.figures)["charts"])
    assert list(panels_of(["loss", "entropy", "kl", "grad_norm"])) == []


def record(step: int, value: float, **more: Any) -> dict[str, Any]:
    return {**ROUGHLY, "step": step, "prompt": "p", "completion": f"{value}", "rewards": {"a": value}, **more}


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_best_and_the_worst_of_evenly_chosen_generations_are_kept(tmp_path: Path) -> None:
    rows = [record(step, float(value)) for step in range(100) for value in (3, 9, 1, 7, 5, 2, 8)]
    found = read_completions(written(tmp_path, [*rows, record(99, 4.0, split="eval")]), {"a": -1.0})
    train = [one for one in found if one.split == "train"]
    steps = list(dict.fromkeys(one.step for one in train))
    assert (len(steps), steps[0], steps[-1]) == (MOST_GENERATIONS, 0, 99)
    assert [one.reward for one in train[:4]] == [-1.0, -2.0, -8.0, -9.0], "a weight below zero turns the order"
    assert [one.text for one in found if one.split == "eval"] == ["4.0"]


def test_what_does_not_apply_is_no_reward_and_long_texts_are_cut(tmp_path: Path) -> None:
    rows = [record(0, 1.0, rewards={"a": 1.0, "b": None}, completion="x" * (LONGEST + 1234), finished=False)]
    path = written(tmp_path, rows)
    with path.open("a") as file:
        file.write('{"step": 3, "comp')
    (one,) = read_completions(path, {})
    assert one.reward == 1.0
    assert one.text.endswith("x … (1,234 more characters)")
    assert read_completions(tmp_path / "none.jsonl", {}) == []


def test_completions_cannot_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    plain = page_of(folder).text.count(NASTY)
    written(folder, [record(0, 1.0, prompt=NASTY, completion=NASTY, rewards={NASTY: 1.0})])
    read = page_of(folder)
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in read.elements]
    assert read.text.count(NASTY) == plain + 3


def logged(**figures: list[float]) -> list[dict[str, Any]]:
    length = max(map(len, figures.values()))
    return [
        {"kind": "train", "step": 10 * at + 10, **{key: values[at] for key, values in figures.items()}}
        for at in range(length)
    ]


def test_held_out_figures_stand_beside_their_own() -> None:
    rows = logged(**{"rewards/chosen": [0.0, 1.0], "rewards/rejected": [0.0, -1.0], "rewards/margins": [0.0, 2.0]})
    rows.append({"kind": "eval", "step": 20, "eval_rewards/chosen": 0.5, "eval_rewards/margins": 1.0})
    charts = {chart["title"]: chart for chart in page_data(rows)["charts"]}
    assert lines_of(charts["Rewards of answers"])["chosen, held-out"] == [0.5]
    assert [(one["color"], one["dashed"]) for one in charts["Rewards of answers"]["series"]] == [
        ("one", False),
        ("one", True),
        ("two", False),
    ]
    assert lines_of(charts["Margin"]) == {"train": [0.0, 2.0], "held-out": [1.0]}


def test_what_is_said_of_a_likelihood_is_not_asked_of_other_losses() -> None:
    raised = {one.rule.name for one in examine(logged(loss=[0.0] * 40), BUILT_IN) if one.raised}
    assert {"first-loss-low", "loss-near-zero", "loss-flat"} <= raised
    online = logged(loss=[0.0] * 40, reward=[0.1] * 40)
    assert not {one.rule.name for one in examine(online, BUILT_IN) if one.raised}
    pairs = logged(loss=[0.69] * 40, **{"rewards/margins": [0.0] * 40})
    assert {one.rule.name for one in examine(pairs, BUILT_IN) if one.raised} == {"loss-flat"}


def test_a_rule_says_at_which_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    norms = [1.0] * 20
    norms[6] = 500.0
    folder = write_run(tmp_path / "run", logged(loss=[2 - 0.02 * at for at in range(20)], grad_norm=norms))
    report(folder, output=None)
    assert "above 100 training is unstable (step 70)" in capsys.readouterr().out
    assert "step 70" in Read((folder / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("reward", "flat"),
    [
        ([0.0] * 10 + [0.5] * 20, False),
        ([0.0] * 30, True),
        ([0.5] * 30, True),
        ([0.1 + 0.01 * at for at in range(30)], False),
        ([-1.0 + 0.02 * at for at in range(30)], False),
    ],
)
def test_a_reward_that_rises_from_zero_is_not_flat(grpo: Path, reward: list[float], flat: bool) -> None:
    rule = next(rule for rule in rules_of(read_run(grpo)) if rule.name == "reward-flat")
    assert [one.raised for one in examine(logged(reward=reward), [rule])] == [flat]


SEARCH = """<script>{
const rows = () => [...document.querySelectorAll("#answers tbody tr")].filter((row) => !row.hidden).length;
const told = { all: rows(), groups: [...document.querySelectorAll("#charts .group")].map((one) => one.textContent) };
told.paths = [...document.querySelectorAll("#charts svg path.line")].every((p) => p.getAttribute("d").startsWith("M"));
search.value = "NEEDLE"; search.dispatchEvent(new Event("input")); told.found = rows();
const made = document.createElement("pre"); made.id = "told"; made.textContent = JSON.stringify(told);
document.body.append(made);
}</script>"""


@pytest.mark.slow
@needs_browser
def test_in_a_browser_curves_are_drawn_and_completions_are_found(grpo: Path, tmp_path: Path) -> None:
    report(grpo, output=tmp_path / "page.html")
    rows = sum(1 for _ in read_run(grpo).completions)
    text = (tmp_path / "page.html").read_text()
    first = text.index('<div class="texts">', text.index('id="answers"')) + len('<div class="texts">')
    text = f"{text[:first]}a needle {text[first:]}"
    (tmp_path / "used.html").write_text(text.replace("</body>", SEARCH + "</body>"))
    document, console = opened(tmp_path / "used.html", tmp_path / "profile")
    assert console == []
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', document, re.DOTALL)[1]))
    groups = ["Rewards", "Completions", "Policy", "Training"]
    assert told == {"all": rows, "groups": groups, "paths": True, "found": 1}


@pytest.mark.slow
@needs_browser
def test_in_a_browser_pairs_have_two_lines(dpo: Path, tmp_path: Path) -> None:
    report(dpo, output=tmp_path / "page.html")
    document, console = opened(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    chart = document[document.index("Rewards of answers") :].partition("</svg>")[0]
    assert len(re.findall(r'class="line (one|two)"', chart)) == 2
