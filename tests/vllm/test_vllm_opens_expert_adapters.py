"""LoRA on experts, as a run exports it and converted to single experts, in a real vLLM: it answers as PEFT does.

Which of the two layouts vLLM reads depends on the model and on a flag of the server, so it is asked with and without.
Mixtral's experts have another name in vLLM than in transformers, and so need other names in the adapter.
`expert_answers.py` says which pieces are vLLM's own on a CPU and which are not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
VLLM_PYTHON = REPOSITORY / ".venv-vllm/bin/python"
WORDS = ("red", "green", "blue", "one", "two", "three", "apple", "pear", "plum", "cat", "dog", "owl", "sun", "moon")
VOCABULARY = 32
EXPERTS, TOKENS = 6, 3
PROMPTS = ([4, 9, 6, 11, 5], [7, 8])
PREFIX = "base_model.model.model.layers.{}.{}.experts"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Family:
    """A tiny random model, a run with LoRA on its experts, and folders made of what the run exported.

    `served` is the run's folder, for Mixtral with vLLM's names for the same tensors.
    """

    name: str
    base: Path
    run: Path
    served: Path
    per_expert: Path
    expert_slowest: Path
    half: Path


def base_model(family: str, folder: Path) -> Path:
    """A tiny random mixture with a tokenizer of a few words, saved as transformers save them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "gpt_oss":
        model = GptOssForCausalLM(GptOssConfig(num_local_experts=EXPERTS, **sizes))
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **sizes))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=32, **sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<end>", "<user>", "<answer>", *WORDS, "?"))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<answer> "
        "{% generation %}{{ m.content }} <end> {% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<answer> {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path) -> Path:
    """A finished run with LoRA on attention and, at another rank and scale, on the experts' products."""
    rows = [(WORDS[i], WORDS[(3 * i + 1) % len(WORDS)]) for i in range(len(WORDS))]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns), encoding="utf-8")
    config = {
        "model": {"name": str(base), "dtype": "float32"},
        "plugins": ["hf", "data", "lora", "sft", "adamw", "trainer"],
        "data": {"train": [{"path": "rows.jsonl", "format": "chat"}]},
        "lora": {
            "r": 4,
            "alpha": 12,
            "rank_pattern": {"experts.down_proj": 2},
            "targets": ["q_proj", "v_proj"],
            "parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        "adamw": {"learning_rate": 5e-2},
        "trainer": {"max_steps": 12, "micro_batch": 7, "log_every": 6},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pegbox", "run", str(folder / "config.yaml")], check=True, timeout=600)
    return folder / "run"


def with_weights(run: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The run's adapter with other tensors."""
    folder.mkdir()
    shutil.copy(run / "adapter_config.json", folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "mixtral"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    from pegbox_kernels.experts.lora_layout import GATE_UP_DOWN, W1_W3_W2, from_peft, to_per_expert

    folder = tmp_path_factory.mktemp(f"experts-{request.param}")
    base = base_model(request.param, folder / "base")
    run = trained(base, folder)
    exported = load_file(run / "adapter_model.safetensors")
    parent = "block_sparse_moe" if request.param == "mixtral" else "mlp"
    renamed = {name.replace(".mlp.experts.", f".{parent}.experts."): tensor for name, tensor in exported.items()}
    converted = {name: tensor for name, tensor in renamed.items() if ".experts." not in name}
    wrong = dict(renamed)
    names = GATE_UP_DOWN if request.param == "qwen3_moe" else W1_W3_W2
    for layer in range(2):
        prefix = PREFIX.format(layer, parent)
        pairs = []
        for wrapper in (f"{prefix}.base_layer", prefix):
            a, b = (renamed[f"{wrapper}.lora_{side}.weight"] for side in "AB")
            pairs.append(from_peft(a, b, EXPERTS))
            wrong[f"{wrapper}.lora_B.weight"] = pairs[-1][1].transpose(0, 1).flatten(1)
        converted |= to_per_expert(*pairs, interleaved=request.param == "gpt_oss", prefix=prefix, names=names)
    per_expert = with_weights(run, folder / "per-expert", converted)
    # PEFT's patterns name parameters; those of single experts are found by the names of their products.
    config = json.loads((run / "adapter_config.json").read_text())
    (per_expert / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {names[2]: 2}}))
    half = {name: tensor for name, tensor in renamed.items() if ".base_layer." not in name}
    return Family(
        name=request.param,
        base=base,
        run=run,
        served=run if parent == "mlp" else with_weights(run, folder / "served", renamed),
        per_expert=per_expert,
        expert_slowest=with_weights(run, folder / "expert-slowest", wrong),
        half=with_weights(run, folder / "half", half),
    )


def asked(family: Family, folder: Path, *, mixed: bool) -> dict[str, Any]:
    """What vLLM answers, by adapter; `mixed` starts it with --enable-mixed-moe-lora-format."""
    assert VLLM_PYTHON.exists(), "vLLM is not installed; type: make vllm"
    adapters = [
        {"name": name, "path": str(getattr(family, name)), "is_3d": name != "per_expert"}
        for name in ("run", "served", "per_expert", "expert_slowest", "half")
    ]
    question = {"model": str(family.base), "mixed": mixed, "adapters": adapters, "prompts": PROMPTS, "tokens": TOKENS}
    (folder / "question.json").write_text(json.dumps(question))
    command = [str(VLLM_PYTHON), str(Path(__file__).with_name("expert_answers.py")), str(folder / "question.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"base"')]
    assert lines, f"vLLM did not answer:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[-1])


@pytest.fixture(scope="module")
def usual(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of a vLLM that was started as always."""
    return asked(family, tmp_path_factory.mktemp("usual"), mixed=False)


@pytest.fixture(scope="module")
def mixed(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of a vLLM that was started to read both layouts."""
    return asked(family, tmp_path_factory.mktemp("mixed"), mixed=True)


def difference(family: Family, answers: list[dict[str, Any]], *, adapter: Path | None) -> float:
    """The largest difference of vLLM's log-probabilities, of all words at all steps, from those of transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    found = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer["ids"]]])
        with torch.no_grad():
            expected = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found = max(found, (torch.tensor(answer["logprobs"]) - expected).abs().max().item())
    return found


def test_a_runs_adapter_on_experts_answers_as_in_transformers_and_peft(family: Family, mixed: dict[str, Any]) -> None:
    assert difference(family, mixed["base"], adapter=None) < 1e-4
    assert difference(family, mixed["base"], adapter=family.run) > 0.1
    assert difference(family, mixed["served"], adapter=family.run) < 1e-4


def test_without_vllms_name_of_the_experts_their_adapters_are_left_out(family: Family, mixed: dict[str, Any]) -> None:
    """vLLM says nothing about it: this is Mixtral's case."""
    assert (difference(family, mixed["run"], adapter=family.run) < 1e-4) == (family.served == family.run)


def test_what_is_converted_to_single_experts_answers_as_the_runs_adapter(family: Family, mixed: dict[str, Any]) -> None:
    assert difference(family, mixed["per_expert"], adapter=family.run) < 1e-4


def test_one_server_reads_one_of_the_two_layouts_by_its_model(family: Family, usual: dict[str, Any]) -> None:
    read, refused = ("served", "per_expert") if family.name == "gpt_oss" else ("per_expert", "served")
    assert difference(family, usual[read], adapter=family.run) < 1e-4
    assert "ValueError" in usual[refused]["refused"]


def test_factors_with_the_expert_slowest_in_b_are_read_and_are_wrong(family: Family, mixed: dict[str, Any]) -> None:
    assert difference(family, mixed["expert_slowest"], adapter=family.run) > 0.1


def test_an_adapter_on_one_of_the_two_products_is_not_read(family: Family, mixed: dict[str, Any]) -> None:
    assert "refused" in mixed["half"]
