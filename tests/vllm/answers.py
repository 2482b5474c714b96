"""Answers of a real vLLM to the same prompts, without and with a run's adapter. Runs in vLLM's own environment.

python answers.py BASE RUN TOKENS PROMPT...    prints {"base": [...], "run": [...]} as its last line
"""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    base, run, tokens, *prompts = sys.argv[1:]
    engine = LLM(
        model=base,
        tokenizer=run,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=16,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**28,
    )
    sampling = SamplingParams(temperature=0, max_tokens=int(tokens))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = {
        name: [output.outputs[0].text for output in engine.chat(chats, sampling, use_tqdm=False, lora_request=adapter)]
        for name, adapter in (("base", None), ("run", LoRARequest("run", 1, run)))
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
