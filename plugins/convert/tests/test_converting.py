"""Whole configs: what is written, that nothing is dropped, that Pegbox accepts it, and what the command says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.cli import main
from pegbox.errors import PegboxError
from pegbox.plan import compose
from pegbox.source import parse
from pegbox_convert import converting
from pegbox_convert.conversion import Conversion, Status
from pegbox_convert.converting import Converted, convert_file
from pegbox_convert.foreign import Foreign, rename
from pegbox_convert.steps import steps_of
from pegbox_convert.table import TABLES, Table
from pegbox_convert.writing import to_yaml

FOREIGN = Path(__file__).parent / "foreign"
FILES = sorted(path.name for path in FOREIGN.iterdir())


def converted(name: str) -> Converted:
    return convert_file(FOREIGN / name)


def statuses(result: Converted) -> dict[str, Status]:
    return {entry.key: entry.status for entry in result.entries}


@pytest.mark.parametrize("name", FILES)
def test_pegbox_accepts_what_is_written_and_every_key_is_reported(name: str) -> None:
    result = converted(name)
    assert result.valid, result.notes
    compose(result.config)
    assert parse(result.text, "new").data == json.loads(json.dumps(result.config))
    if name.endswith(".yaml"):
        leaves = Foreign(parse((FOREIGN / name).read_bytes(), name).data).leaves()
        assert len(leaves) > 5
        assert {re.sub(r"\.0\.(path|type)$", "", key) for key in leaves} <= {
            re.sub(r"\.0\.(path|type)$", "", entry.key) for entry in result.entries
        }


def test_an_axolotl_run_keeps_its_batches_masks_and_schedule() -> None:
    result = converted("axolotl-qlora.yaml")
    config = result.config
    assert config["plugins"] == [
        *("hf", "data", "packing", "bnb", "lora", "activations", "sft", "optim", "bnb-optim", "trainer", "trackers")
    ]
    assert config["data"]["train"][0] == {
        "path": "acme/support-chats",
        "split": "train[:50%]",
        "format": "chat",
        "fields": {"messages": "conversations", "role": "from", "content": "value"},
        "options": {
            "roles": {"human": "user", "gpt": "assistant"},
            "train_roles": ["assistant"],
            "train_end_of_turn": "last",
        },
    }
    assert (config["trainer"]["micro_batch"], config["trainer"]["accumulation"]) == (2, 4)
    assert config["optim"]["name"], config["optim"]["schedule"] == ("paged_adamw_8bit", "cosine")
    assert config["packing"] == {"length": 4096}
    assert config["bnb"]["kind"] == "nf4"
    assert config["model"] == {"name": "acme/small-chat-8b", "dtype": "bfloat16"}
    assert config["trackers"] == {"wandb": {"project": "support", "entity": "acme"}}
    found = statuses(result)
    assert found["seed"] is Status.DEFAULT
    assert config["seed"] == 42
    assert found["saves_per_epoch"] is Status.MAPPED
    assert (config["trainer"]["saves_per_epoch"], config["trainer"]["evals_per_epoch"]) == (1, 4)
    assert not result.unsupported
    assert found["pad_to_sequence_len"] is Status.UNNEEDED


def test_older_spellings_parts_of_a_run_and_products_of_batches_are_understood() -> None:
    result = converted("axolotl-full.yaml")
    trainer, optim, found = result.config["trainer"], result.config["optim"], statuses(result)
    assert (trainer["micro_batch"], trainer["accumulation"]) == (1, 16)
    assert trainer["eval_every"] == 100
    assert optim["warmup_steps"] == 12
    assert optim["options"] == {"betas": [0.9, 0.95], "eps": 1e-6}
    assert (optim["schedule"], optim["schedule_options"]) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert result.config["neftune"] == {"alpha": 5.0}
    assert result.config["hf"]["attention"] == "sdpa"
    assert result.config["use"] == {"place_model": "fsdp"}
    assert result.config["activations"]["offload"] == "cpu"
    assert found["noisy_embedding_alpha"] is Status.MAPPED
    assert found["fsdp_config.fsdp_transformer_layer_cls_to_wrap"] is Status.UNNEEDED
    assert found["debug_level"] is Status.UNKNOWN
    assert found["deepspeed"] is Status.UNNEEDED


def test_what_is_missing_is_named() -> None:
    notes = {
        entry.key: entry.note
        for name in ("axolotl-experts.yaml", "axolotl-grpo.yaml", "axolotl-ebft.yaml", "axolotl-reward.yaml")
        for entry in converted(name).unsupported
    }
    assert "EBFT" in notes["rl"]
    assert "async prefetch" in notes["trl.async_prefetch"]
    assert notes["ebft.stride"] == "EBFT"
    assert "kernels" in notes["use_scattermoe"]
    assert "DeepSpeed" in notes["deepspeed"]
    assert "FP8" in notes["fp8"]
    assert "gemma4" in notes["chat_template"]
    assert "kernels" in notes["plugins"]


def test_a_config_of_another_method_cannot_run_as_supervised_training(tmp_path: Path) -> None:
    assert "sft" not in converted("axolotl-grpo.yaml").config["plugins"]
    assert "sft" not in converted("axolotl-reward.yaml").config["plugins"]
    assert "sft" not in converted("axolotl-ebft.yaml").config["plugins"]
    assert "# Not in this config:\n#   rl (not supported yet" in converted("axolotl-ebft.yaml").text
    path = tmp_path / "dpo.yaml"
    path.write_text("stage: ppo\nmodel_name_or_path: m\ndataset: d\n")
    assert "sft" not in convert_file(path).config["plugins"]
    path.write_text("model: {model_name: m}\ntraining: {trainer_type: TRL_GKD}\n")
    assert "sft" not in convert_file(path).config["plugins"]


def test_a_trl_run_writes_the_defaults_of_trl() -> None:
    result = converted("trl-lora.yaml")
    config, found = result.config, statuses(result)
    assert config["lora"] == {"targets": ["q_proj", "v_proj"], "dtype": "bfloat16", "r": 8, "dropout": 0.05}
    assert found["lora_dropout"] is Status.DEFAULT
    assert config["data"]["max_length"] == 2048
    assert config["data"]["overlong"] == "truncate"
    assert config["data"]["eval"][0]["split"] == "validation"
    assert config["bnb"] == {"kind": "nf4", "double_quant": False, "compute_dtype": "float32"}
    assert config["optim"]["warmup_ratio"] == 0.03
    assert config["trainer"]["precision"] == "bf16"
    assert config["trainer"]["save_every"] == 500
    assert config["trainer"]["keep"] is None
    assert config["activations"] == {"policy": "full"}
    assert config["trackers"]["wandb"] == {"name": "first"}
    assert found["use_liger_kernel"] is Status.LATER


def test_a_command_line_is_read_as_a_config() -> None:
    config = converted("trl-command.txt").config
    assert config["data"]["train"] == [
        {"path": "acme/plain", "format": "pretraining", "fields": {"text": "body"}, "options": {"split": False}}
    ]
    assert config["lora"]["targets"] == ["q_proj", "k_proj"]
    assert config["packing"] == {"length": 1024}
    assert config["hf"]["special_tokens"] == {"eos_token": "<|im_end|>"}


def test_flags_of_a_command_line_lie_over_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model_name_or_path: m\ndataset_name: acme/d\nlearning_rate: 1e-3\n")
    Path("run.sh").write_text("trl sft --config base.yaml --learning-rate 1e-4 --max_steps=7\n")
    config = convert_file(Path("run.sh")).config
    assert (config["optim"]["learning_rate"], config["trainer"]["max_steps"]) == (1e-4, 7)
    Path("run.sh").write_text("trl sft --config missing.yaml\n")
    with pytest.raises(PegboxError, match="cannot be read"):
        convert_file(Path("run.sh"))


OLDER = {
    "flash_attention: true": ("hf.attention", "flash_attention_2"),
    "eager_attention: true": ("hf.attention", "eager"),
    "flex_attention: true": ("hf.attention", "flex_attention"),
    "noisy_embedding_alpha: 3": ("neftune.alpha", 3.0),
    "eval_table_size: 4": ("samples.rows", 4),
    "bfloat16: true": ("trainer.precision", "bf16"),
    "rope_scaling: {rope_type: linear, factor: 2}": (
        "hf.config_overrides.rope_scaling",
        {"rope_type": "linear", "factor": 2},
    ),
    "gradient_checkpointing: offload": ("activations.offload", "cpu"),
    "fsdp: [full_shard]": ("use.place_model", "fsdp"),
}


@pytest.mark.parametrize("written", OLDER)
def test_older_spellings_of_axolotl_are_accepted(written: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"base_model: m\nlearning_rate: 1e-4\n{written}\n")
    result = convert_file(path)
    place, value = OLDER[written]
    found: Any = result.config
    for part in place.split("."):
        found = found[part]
    assert found == value
    assert not result.unsupported


@pytest.mark.parametrize(
    "written",
    [
        *(
            "xformers_attention: true",
            "sage_attention: true",
            "sequence_parallel_degree: 2",
            "dpo_norm_loss: true",
            "rl: ppo",
        ),
        *("max_packed_sequence_len: 9", "s2_attention: true", "flash_attn_rms_norm: true", "unsloth_rope: true"),
        *("flash_attn_d512: true", "liger_swiglu: true", "trl: {replay_buffer_size: 2}"),
    ],
)
def test_what_axolotl_itself_has_replaced_is_named_where_nothing_stands_for_it(written: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"base_model: m\n{written}\n")
    (entry,) = convert_file(path).unsupported
    assert entry.status is Status.LATER
    assert written.startswith(entry.key.split(".")[0])


def test_a_mixture_keeps_files_and_fractions() -> None:
    config = converted("trl-mixture.yaml").config
    first, second = config["data"]["train"]
    assert first["path"] == ["a.jsonl", "b.jsonl"]
    assert (second["name"], second["weight"]) == ("en", 0.5)
    assert config["data"]["eval_fraction"] == 0.1
    assert "dft" in config["plugins"]
    assert "activations" not in config["plugins"]
    assert config["trainer"]["save_every"] is None
    assert config["trainer"]["precision"] == "fp32"


def test_oumi_and_llama_factory_keep_adapters_batches_and_masks() -> None:
    oumi, factory = converted("oumi-lora.yaml").config, converted("factory-lora.yaml").config
    assert oumi["lora"]["parameters"] == ["7.mlp.experts.gate_up_proj"]
    assert oumi["data"]["train"][1]["fields"] == {"prompt": "ask", "completion": "say"}
    assert oumi["data"]["train"][0]["limit"] == 500
    assert oumi["hf"]["trust_remote_code"] == ["acme/experts-20b"]
    assert (oumi["trainer"]["micro_batch"], oumi["trainer"]["accumulation"]) == (4, 4)
    assert (factory["lora"]["r"], factory["lora"]["alpha"]) == (8, 16.0)
    assert factory["data"]["limit"] == 1000
    assert factory["hf"]["chat_template"] == "llama-3"
    assert factory["trainer"]["eval_every"] == 500


def test_rows_of_local_files_decide_the_format_and_paths_follow_the_new_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("trl.yaml").write_text("model_name_or_path: m\ndataset_name: rows.jsonl\n")
    result = convert_file(Path("trl.yaml"), folder=tmp_path / "configs")
    assert result.config["data"]["train"] == [
        {"path": "../rows.jsonl", "format": "completion", "options": {"chat_template": False}}
    ]


def test_held_out_files_of_a_folder_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    for split in ("train", "test"):
        Path(f"rows/{split}.jsonl").write_text('{"text": "a"}\n')
    Path("trl.yaml").write_text("model_name_or_path: m\ndataset_name: rows\neval_strategy: epoch\n")
    data = convert_file(Path("trl.yaml")).config["data"]
    assert (data["train"][0]["split"], data["eval"][0]["split"]) == ("train", "test")


def test_datasets_of_llama_factory_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    info = {
        "talks": {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "turns"}},
        "pairs": {"hf_hub_url": "acme/pairs", "columns": {"prompt": "q", "response": "a"}},
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    Path("data/talks.json").write_text("[]")
    Path("f.yaml").write_text("model_name_or_path: m\nstage: sft\ndataset: talks, pairs\nmask_history: true\n")
    talks, pairs = convert_file(Path("f.yaml")).config["data"]["train"]
    assert (talks["path"], talks["fields"]["messages"], talks["options"]["turns"]) == (
        "data/talks.json",
        "turns",
        "last",
    )
    assert (pairs["path"], pairs["format"], pairs["fields"]) == (
        "acme/pairs",
        "alpaca",
        {"instruction": "q", "output": "a"},
    )


KEYS = {program: sorted(Table.load(program).known()) for program in TABLES}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5000),
    st.floats(0, 2, allow_nan=False),
    st.sampled_from(["", "auto", "true", "no", "steps", "epoch", "lora", "2e-4", "a, b", "x=1", "cosine", "all"]),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 3), max_size=2),
    st.just([{"path": "p", "type": "chat_template", "x": 1}]),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_key_is_dropped_whatever_stands_in_a_config(data: st.DataObject) -> None:
    program = data.draw(st.sampled_from(TABLES))
    tree: dict[str, Any] = {}
    for key in data.draw(st.lists(st.sampled_from(KEYS[program]), max_size=8, unique=True)):
        holder, (*parents, last) = tree, key.split(".")
        for part in parents:
            inner = holder.setdefault(part, {})
            holder = inner if isinstance(inner, dict) else holder
        holder[last] = data.draw(VALUES)
    tree["nobody_knows"] = 1
    foreign, table = Foreign(tree), Table.load(program)
    rename(foreign, table)
    conversion = Conversion(foreign, table, Path())
    conversion.finish(steps_of(program))
    leaves = {foreign.written.get(leaf, leaf) for leaf in foreign.leaves()}
    assert leaves <= conversion.entries.keys()
    assert conversion.entries["nobody_knows"].status is Status.UNKNOWN
    text = to_yaml(conversion.config(), conversion.sources, table.title, "x", ["y"])
    assert parse(text, "new").data == json.loads(json.dumps(conversion.config()))


@pytest.mark.parametrize(
    "text", ["yes: it's", "two\nlines", "2e-4", "null", "# no", "a: b", "ünï 'x' \"y\"", "", " edge ", "~", "- x", "\t"]
)
def test_texts_survive_the_writing(text: str) -> None:
    config = {"model": {"name": text}, "list": [text, {"inner": text}], text: 1}
    assert parse(to_yaml(config, {"model.name": "k"}, "T", "f", []), "new").data == config


def test_exit_codes_output_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pegbox", "convert", *arguments])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    source, target = str(tmp_path / "axolotl.yaml"), tmp_path / "new" / "config.yaml"
    Path(source).write_text((FOREIGN / "axolotl-qlora.yaml").read_text() + "cut_cross_entropy: true\ntf32: true\n")
    assert run(source, "--output", str(target)) == 0
    assert "Not supported yet (2)" in capsys.readouterr().out
    assert parse(target.read_bytes(), "new").data["model"]["name"] == "acme/small-chat-8b"
    assert run(source, "--output", str(target)) == 2
    assert run(source, "--strict") == 1
    capsys.readouterr()
    assert run(source, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["from"] == "Axolotl"
    assert {"key", "value", "status", "ours", "note", "line"} == report["keys"][0].keys()
    (tmp_path / "broken.yaml").write_text("a: [")
    assert run(str(tmp_path / "broken.yaml")) == 2
    assert run(str(tmp_path / "missing.yaml")) == 2
    (tmp_path / "other.yaml").write_text("services: {web: 1}")
    assert run(str(tmp_path / "other.yaml")) == 2
    assert run(source, "--from", "axolot") == 2


def test_the_report_says_whether_pegbox_accepts_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base_model: m\nadapter: lora\nlora_target_linear: true\n")
    without_data = convert_file(path)
    assert not without_data.valid
    assert "data.train" in without_data.notes[1] or "'train'" in without_data.notes[1]
    installed = {name: found for name, found in converting.discover().items() if name != "lora"}
    monkeypatch.setattr(converting, "discover", lambda: installed)
    assert convert_file(path).notes == ["Not checked: lora not installed. Type: pip install pegbox-lora"]


def test_the_example_of_the_readme_is_what_the_command_writes(tmp_path: Path) -> None:
    readme = (FOREIGN.parents[1] / "README.md").read_text()
    source, written = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "axolotl.yaml"
    path.write_text(source)
    assert convert_file(path).text.split() == written.split()


def test_a_close_name_is_offered_for_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base_model: m\nsequence_lenn: 5\n")
    (entry,) = [entry for entry in convert_file(path).entries if entry.status is Status.UNKNOWN]
    assert "sequence_len" in entry.note
    assert entry.line == "a.yaml:2"
    with pytest.raises(PegboxError, match="which is no program"):
        convert_file(path, "trll")
