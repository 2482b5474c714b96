"""Preferences, reward models and online methods: the plugins and settings that a config of each program becomes."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import ConfigError
from pegbox.events import RunBegins
from pegbox.plan import compose, require_training
from pegbox_convert.conversion import Status
from pegbox_convert.converting import Converted, convert_file

FOREIGN = Path(__file__).parent / "foreign"
PLUGINS = {
    "axolotl-dpo.yaml": ["reference", "dpo"],
    "axolotl-ipo.yaml": ["reference", "dpo"],
    "axolotl-kto.yaml": ["reference", "kto"],
    "axolotl-orpo.yaml": ["orpo"],
    "axolotl-simpo.yaml": ["simpo"],
    "axolotl-reward.yaml": ["reward"],
    "axolotl-prm.yaml": ["prm"],
    "axolotl-grpo.yaml": ["reference", "grpo", "rollout-vllm", "reward-functions", "reward-model"],
    "axolotl-gdpo.yaml": ["grpo", "rollout-hf", "reward-functions"],
    "trl-dpo.yaml": ["reference", "dpo"],
    "trl-kto.txt": ["kto", "reference"],
    "trl-orpo.txt": ["orpo"],
    "trl-cpo.yaml": ["simpo"],
    "trl-reward.txt": ["reward"],
    "trl-grpo.yaml": ["reference", "grpo", "rollout-vllm", "reward-functions"],
    "trl-rloo.txt": ["reference", "grpo", "rollout-hf", "reward-model"],
    "oumi-dpo.yaml": ["reference", "dpo"],
    "oumi-kto.yaml": ["reference", "kto"],
    "oumi-grpo.yaml": ["grpo", "rollout-hf", "reward-functions"],
    "factory-dpo.yaml": ["reference", "dpo"],
    "factory-kto.yaml": ["reference", "sft", "kto"],
    "factory-orpo.yaml": ["orpo"],
    "factory-simpo.yaml": ["simpo"],
    "factory-reward.yaml": ["reward"],
}
METHODS = {plugin for plugins in PLUGINS.values() for plugin in plugins} | {"cpo", "dft"}


@cache
def converted(name: str) -> Converted:
    return convert_file(FOREIGN / name)


def written(text: str, path: Path, program: str = "auto") -> Converted:
    path.write_text(text)
    result = convert_file(path, program)
    assert result.valid, result.notes
    return result


def about(result: Converted, key: str) -> tuple[Status, str]:
    entry = next(entry for entry in result.entries if entry.key == key)
    return entry.status, entry.note


@pytest.mark.parametrize("name", PLUGINS)
def test_a_method_lists_its_plugins_in_the_order_in_which_they_wrap(name: str) -> None:
    assert [plugin for plugin in converted(name).config["plugins"] if plugin in METHODS] == PLUGINS[name]


@pytest.mark.parametrize("name", PLUGINS)
def test_the_run_begins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that plugins check before anything is loaded passes, given the user's reward functions, models and vLLM."""
    body = "(completions, **columns):\n    return [1.0] * len(completions)\n"
    rewards = "".join(f"def {name}{body}" for name in ("right", "form", "short", "brief"))
    for module in ("rewards", "my_rewards", "my/module"):
        (tmp_path / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{module}.py").write_text(rewards)
    result = deepcopy(converted(name).config)
    for one in [f for f in result.get("reward-functions", {}).get("functions", ()) if isinstance(f, str)]:
        if one.startswith(("my_lib", "trl.")):
            result["reward-functions"]["functions"].remove(one)
            result["rewards"].pop(one.rpartition(":")[2])
    if "rollout-vllm" in result["plugins"]:
        # What the report asks for: where vLLM is.
        result["rollout-vllm"] = {"url": "http://127.0.0.1:1"}
    for judge in result.get("reward-model", {}).get("models", ()):
        (tmp_path / judge["name"]).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ctx = compose(result)
    require_training(ctx)
    ctx.notify(RunBegins())


def test_losses_of_pairs_keep_their_weights_and_settings() -> None:
    assert converted("axolotl-dpo.yaml").config["dpo"] == {
        "loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
        "beta": 0.2,
        "ld_alpha": 0.5,
        "label_smoothing": 0.1,
    }
    assert converted("axolotl-dpo.yaml").config["reference"] == {"how": "precomputed"}
    assert converted("axolotl-ipo.yaml").config["dpo"] == {"loss": {"ipo": 1.0, "sft": 0.5}, "beta": 0.3}
    assert converted("oumi-dpo.yaml").config["dpo"] == {"loss": "ipo", "beta": 0.2}
    factory = converted("factory-dpo.yaml").config
    assert factory["dpo"]["loss"] == {"sigmoid": pytest.approx(0.8), "bco_pair": pytest.approx(0.2), "sft": 0.2}
    assert factory["reference"] == {"how": "copy", "model": "acme/small-8b-sft"}
    assert converted("axolotl-kto.yaml").config["kto"] == {
        "beta": 0.5,
        "desirable_weight": 0.2,
        "undesirable_weight": 1.0,
    }
    assert converted("factory-kto.yaml").config["loss"] == {"kto": 1.0, "sft": 0.1}
    assert converted("trl-orpo.txt").config["orpo"] == {"alpha": 0.2}
    assert converted("axolotl-simpo.yaml").config["simpo"] == {"beta": 2.0, "gamma": 1.2, "sft_weight": 0.0}
    assert converted("trl-cpo.yaml").config["simpo"] == {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.5}
    assert converted("trl-reward.txt").config["reward"] == {"center": 0.01}


def test_a_reference_is_precomputed_beside_kto_where_it_has_no_kl_term(tmp_path: Path) -> None:
    assert converted("trl-kto.txt").config["reference"] == {"how": "precomputed"}
    text = "model_name_or_path: m\ndataset_name: a/b\nprecompute_ref_log_probs: true\ndesirable_weight: 1.5\n"
    result = written(text, tmp_path / "a.yaml")
    assert about(result, "precompute_ref_log_probs")[0] is Status.LATER
    assert "reference" not in result.config


def test_simpo_of_axolotl_without_its_keys_is_trls_cpo_trainer(tmp_path: Path) -> None:
    text = "base_model: m\nrl: simpo\nlearning_rate: 1e-6\ndatasets: [{path: a/b, type: chatml.ultra}]\n"
    result = written(text, tmp_path / "a.yaml")
    assert result.config["simpo"] == {"beta": 0.1, "gamma": 0.5, "sft_weight": 1.0}
    assert about(result, "cpo_alpha")[0] is Status.DEFAULT


@pytest.mark.parametrize("name", ["axolotl-dpo.yaml", "axolotl-kto.yaml", "trl-dpo.yaml", "factory-dpo.yaml"])
def test_dropout_of_an_adapter_is_off_where_the_trainer_switches_it_off(name: str) -> None:
    assert "dropout" not in converted(name).config["lora"]


def test_dropout_stays_where_a_config_says_so(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: a/b\nbeta: 0.2\nuse_peft: true\nlora_dropout: 0.2\n"
    kept = written(text + "disable_dropout: false\n", tmp_path / "a.yaml")
    assert kept.config["lora"]["dropout"] == 0.2
    off = written(text + "disable_dropout: true\n", tmp_path / "b.yaml")
    assert "dropout" not in off.config["lora"]
    assert about(off, "lora_dropout")[0] is Status.UNNEEDED


def test_types_of_axolotl_become_formats_layouts_and_fields() -> None:
    messages, intel = converted("axolotl-dpo.yaml").config["data"]["train"]
    assert messages["fields"] == {
        "prompt": "conversation",
        "chosen": "better",
        "rejected": "worse",
        "role": "from",
        "content": "value",
    }
    assert (intel["format"], intel["options"]) == ("preference", {"layout": "intel"})
    (own,) = converted("axolotl-ipo.yaml").config["data"]["train"]
    assert own["fields"] == {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "sys"}
    assert own["options"] == {
        "chat_template": False,
        "prompt_format": "[INST] {prompt} [/INST]",
        "answer_format": " {answer}",
    }
    ultra, votes = converted("axolotl-kto.yaml").config["data"]["train"]
    assert (ultra["format"], ultra["options"]) == ("unpaired", {"layout": "ultra"})
    assert votes["fields"] == {"prompt": "ask", "completion": "say", "label": "liked"}
    (steps,) = converted("axolotl-prm.yaml").config["data"]["train"]
    assert (steps["format"], steps["options"]["step_separator"]) == ("steps", "\n")


TYPES = {
    ("dpo", "chat_template.default"): {"fields": {"prompt": "messages"}},
    ("dpo", "chat_template.argilla_chat"): {"options": {"layout": "argilla_chat"}},
    ("dpo", "zephyr.nectar"): {"options": {"layout": "nectar"}},
    ("dpo", "passthrough.default"): {"options": {"chat_template": False}},
    ("ipo", "llama3.icr"): {"options": {"layout": "icr"}},
    ("orpo", "chat_template.argilla"): {"options": {"layout": "argilla_chat"}},
    ("kto", "chatml.prompt_pairs"): {"options": {"layout": "prompt_pairs"}},
    **{("dpo", f"{t}.{k}"): {"options": {"layout": k}} for t in ("chatml", "llama3") for k in ("argilla", "intel")},
    **{("kto", f"{t}.{k}"): {"options": {"layout": k}} for t in ("chatml", "llama3") for k in ("argilla", "ultra")},
}


@pytest.mark.parametrize(("method", "kind"), TYPES)
def test_every_named_type_of_answers_has_its_columns(method: str, kind: str, tmp_path: Path) -> None:
    text = f"base_model: m\nrl: {method}\nlearning_rate: 1e-6\ndatasets: [{{path: a/b, type: {kind}}}]\n"
    result = written(text, tmp_path / "a.yaml")
    (entry,) = result.config["data"]["train"]
    form = "unpaired" if method == "kto" else "preference"
    assert entry == {"path": "a/b", "format": form, **TYPES[method, kind]}
    template = kind.partition(".")[0]
    named = {"chatml": "chatml", "llama3": "llama-3", "zephyr": "zephyr"}.get(template)
    assert result.config.get("hf", {}).get("chat_template") == named
    assert not result.unsupported


def test_rows_of_a_file_say_what_trl_takes_them_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def entry(row: dict[str, Any], command: str) -> dict[str, Any]:
        Path("rows.jsonl").write_text(json.dumps(row) + "\n")
        more = " --reward_funcs a.right" if command == "grpo" else ""
        Path("run.sh").write_text(f"trl {command} --model_name_or_path m --dataset_name rows.jsonl{more}\n")
        config = convert_file(Path("run.sh")).config
        assert config["data"].get("columns") == ([*row.keys() - {"prompt"}] if command == "grpo" else None)
        return dict(config["data"]["train"][0])

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert entry(pair, "dpo")["options"] == {"chat_template": False}
    assert entry(pair, "kto")["options"] == {"chat_template": False, "unpair": True}
    said = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}
    assert "options" not in entry(said, "dpo")
    assert entry({"prompt": [{"role": "user", "content": "a"}], "answer": "4"}, "grpo")["format"] == "prompts"


def test_margins_of_a_file_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}\n')
    result = written("trl reward --model_name_or_path m --dataset_name rows.jsonl\n", Path("run.sh"))
    assert result.config["reward"] == {"margin": True}
    assert result.config["data"]["columns"] == ["margin"]
    # Our default: rows that are too long are left out, as TRL leaves them out here alone.
    assert "overlong" not in result.config["data"]


def test_datasets_of_llama_factory_keep_ranked_and_tagged_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    messages = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "pairs": {"hf_hub_url": "a/p", "ranking": True, "formatting": "sharegpt", "columns": messages},
        "votes": {
            "hf_hub_url": "a/v",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "texts": {
            "hf_hub_url": "a/t",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    pairs = written("model_name_or_path: m\nstage: dpo\ndataset: pairs\n", Path("a.yaml")).config["data"]["train"][0]
    assert (pairs["path"], pairs["format"]) == ("a/p", "preference")
    assert pairs["fields"] == {"prompt": "conversations", "role": "from", "content": "value"}
    assert pairs["options"]["roles"]["gpt"] == "assistant"
    votes = written("model_name_or_path: m\nstage: kto\ndataset: votes\n", Path("b.yaml")).config["data"]["train"][0]
    assert (votes["format"], votes["fields"]) == ("unpaired", {"completion": "messages", "prompt": ""})
    texts = written("model_name_or_path: m\nstage: dpo\ndataset: texts\n", Path("c.yaml"))
    assert texts.config["data"]["train"][0]["fields"] == {"prompt": "instruction", "query": "input"}
    assert not texts.unsupported


def test_an_online_run_counts_prompts_and_completions_where_the_other_counts_completions() -> None:
    grpo = converted("axolotl-grpo.yaml")
    # 4 completions, 4 times, in groups of 8
    assert (grpo.config["trainer"]["batch"], grpo.config["trainer"]["micro_batch"]) == (2, 4)
    assert "accumulation" not in grpo.config["trainer"]
    assert "multiply" in about(grpo, "gradient_accumulation_steps")[1]
    # 64 completions in groups of 4, and 8 times 4 of them in each step
    gdpo = converted("axolotl-gdpo.yaml").config
    assert (gdpo["trainer"]["batch"], gdpo["grpo"]["steps_per_generation"]) == (16, 2)
    # 8 completions, 4 times before the next generation, of which 2 make a step
    trl = converted("trl-grpo.yaml").config
    assert (trl["trainer"]["batch"], trl["grpo"]["steps_per_generation"]) == (4, 2)
    assert converted("trl-rloo.txt").config["trainer"]["batch"] == 4


def test_an_online_run_keeps_objective_sampling_rewards_and_engine() -> None:
    config = converted("axolotl-grpo.yaml").config
    grpo = config["grpo"]
    assert (grpo["loss_type"], grpo["scale_rewards"], grpo["importance_sampling_level"]) == (
        "dr_grpo",
        "none",
        "sequence",
    )
    assert (grpo["stop_ids"], grpo["stop"], grpo["importance_sampling_clip_max"]) == ([2, 7], ["</answer>"], 2.0)
    assert config["reward-functions"] == {"functions": ["rewards:right", "rewards:form"], "workers": 4}
    assert config["reward-model"] == {"models": [{"name": "acme/judge-1b"}]}
    assert config["rewards"] == {"right": 1.0, "form": 0.5, "reward-model/judge-1b": 0.25}
    assert (config["rollout-vllm"]["memory_share"], config["rollout-vllm"]["tensor_parallel"]) == (0.85, 2)
    trl = converted("trl-grpo.yaml")
    assert trl.config["reward-functions"]["functions"][0] == "trl.rewards:accuracy_reward"
    assert trl.config["reference"] == {"how": "copy", "sync_every": 64}
    assert about(trl, "epsilon")[0] is Status.UNNEEDED
    rloo = converted("trl-rloo.txt").config["grpo"]
    assert (rloo["advantage"], rloo["scale_rewards"], rloo["kl_placement"], rloo["kl_estimator"]) == (
        "rloo",
        "batch",
        "reward",
        "k1",
    )
    assert converted("axolotl-gdpo.yaml").config["grpo"]["multi_objective_aggregation"] == "normalize_then_sum"


def test_a_function_in_a_file_is_no_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("good.py").write_text("def vowels(completions, **columns):\n    return [0.0 for _ in completions]\n")
    text = "model_name_or_path: m\ndataset_name: a/b\nreward_funcs: [./good.py:vowels, other.vowels, acme/judge]\n"
    Path("a.yaml").write_text(text + "reward_weights: [1, 2, 3]\n")
    config = convert_file(Path("a.yaml"), folder=Path("configs")).config
    named = {"use": "other:vowels", "name": "other-vowels"}
    assert config["reward-functions"]["functions"] == ["../good.py:vowels", named]
    assert config["reward-model"]["models"] == [{"name": "acme/judge"}]
    assert config["rewards"] == {"vowels": 1.0, "other-vowels": 2.0, "reward-model/judge": 3.0}


def test_a_server_that_exists_is_reached_by_its_address(tmp_path: Path) -> None:
    text = "base_model: m\nrl: grpo\nlearning_rate: 1e-6\ndatasets: [{path: a/b}]\n"
    text += "trl: {use_vllm: true, vllm_server_host: 0.0.0.0, vllm_server_port: 8001, reward_funcs: [a.b]}\n"
    result = written(text, tmp_path / "a.yaml")
    assert result.config["rollout-vllm"] == {"url": "http://127.0.0.1:8001"}
    assert "vllm serve" in about(result, "trl.vllm_server_port")[1]


def test_what_online_methods_lack_is_refused_by_name() -> None:
    notes = {entry.key: entry.note for entry in converted("axolotl-grpo.yaml").unsupported}
    for key, word in (
        ("trl.async_prefetch", "async prefetch"),
        ("trl.replay_buffer_size", "replay buffer"),
        ("trl.reroll_start_fraction", "re-roll"),
        ("trl.skip_zero_advantage_batches", "nothing is skipped"),
        ("datasets.0.type", "made by a function"),
    ):
        assert word in notes[key]
    assert "registry" in {e.key: e.note for e in converted("oumi-grpo.yaml").unsupported}["training.reward_functions"]


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("loss_type: apo_zero_unpaired", "kto"),
        ("loss_type: hinge", "dpo"),
        ("loss_type: [ipo]\nbeta: 0.3", "dpo"),
        ("loss_type: dr_grpo", "grpo"),
        ("desirable_weight: 2.0", "kto"),
        ("center_rewards_coefficient: 0.1", "reward"),
        ("loss_type: ipo\ncpo_alpha: 0.2", "cpo"),
        ("num_generations: 4", "grpo"),
        ("loss_type: nll", "sft"),
        ("max_length: 9", "sft"),
    ],
)
def test_a_trl_config_is_told_by_the_keys_of_its_trainer(text: str, method: str, tmp_path: Path) -> None:
    result = written(f"model_name_or_path: m\ndataset_name: a/b\n{text}\n", tmp_path / "a.yaml")
    assert method in result.config["plugins"]
    if method != "sft":
        assert f"`trl {method}`" in about(result, text.partition(":")[0])[1]


def test_the_command_says_the_trainer_before_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = "model_name_or_path: m\ndataset_name: a/b\nbeta: 0.3\n"
    for command in ("dpo", "kto", "orpo", "cpo"):
        assert command in written(text, path, f"trl:{command}").config["plugins"]
    with pytest.raises(ConfigError, match="no such command"):
        convert_file(path, "trl:ppo")
    with pytest.raises(ConfigError, match="no such command"):
        convert_file(path, "oumi:dpo")
