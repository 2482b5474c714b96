"""Log-probabilities of a real vLLM for mixtures with adapters on their experts. Runs in vLLM's own environment.

python expert_answers.py QUESTION.json     prints {"base": [...], NAME: [...] or {"refused": "..."}} as its last line

The engine, the reading of adapters, their packing, slots and scales, routing, attention and sampling are vLLM's own;
so are the order of the experts' products and the kernel that multiplies by A and B, under Triton's interpreter. vLLM
has no experts with LoRA for a CPU, so four pieces for GPUs are replaced by plain ones: the base product of the chosen
experts, the sorting of tokens by expert (its kernel for small batches needs none), gpt-oss's activation and the sum
over k.
"""

# ruff: noqa: E402 - vLLM looks for Triton while it is imported

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import triton
import triton.language as tl
import vllm.triton_utils

vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl  # vLLM has placeholders here where there is no GPU

from vllm import LLM, SamplingParams
from vllm.lora.ops.triton_ops import fused_moe_lora_op
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.platforms import current_platform


def base_product(x, weight_ENK, out, _a, _b, topk_weights, _sorted, expert_ids, _padded, weighted, top_k, *_, **named):
    """What `invoke_fused_moe_triton_kernel` writes into out (T, k, N): each pair's row of x times its expert."""
    chosen = expert_ids.long()
    rows = x[torch.arange(chosen.numel()) // top_k]
    found = torch.einsum("pk,pnk->pn", rows, weight_ENK[chosen])
    if named["B_bias"] is not None:
        found = found + named["B_bias"][chosen]
    if weighted:
        found = found * topk_weights.reshape(-1, 1)
    out.view(-1, out.shape[-1]).copy_(found)


def lora_w13(self, y, x, a, b, topk_ids, topk_weights, *others, add_inputs=True, **_):
    """`add_lora_w13` of vLLM's wrapper for GPUs, with its kernel for small batches, which asks no sorted tokens."""
    enabled = others[6]
    tokens = self.token_lora_indices
    fused_moe_lora_op._run_fused_moe_lora_small_batch(
        y, x, a, b, topk_weights, topk_ids.reshape(-1), tokens, topk_ids.shape[1], enabled, False, add_inputs
    )
    return None, topk_ids.reshape(-1), None, tokens


def lora_w2(self, y, x, a, b, topk_weights, _sorted, expert_ids, _padded, tokens, *others, add_inputs=True):
    """`add_lora_w2`, likewise: the delta is multiplied by the router's weights."""
    enabled = others[5]
    fused_moe_lora_op._run_fused_moe_lora_small_batch(
        y, x, a, b, topk_weights, expert_ids, tokens, topk_weights.shape[1], enabled, True, add_inputs
    )


vllms_activation = triton_moe.TritonExperts.activation


def activation(self, kind, output, given, **named):
    """vLLM's own, but for gpt-oss's, whose operator is built for GPUs alone."""
    if kind != MoEActivation.SWIGLUOAI:
        return vllms_activation(self, kind, output, given, **named)
    gate, up = given[:, ::2].clamp(max=7.0), given[:, 1::2].clamp(-7.0, 7.0)
    output.copy_((up + 1) * gate * torch.sigmoid(1.702 * gate))
    return None


triton_moe.invoke_fused_moe_triton_kernel = base_product
triton_moe._prepare_expert_assignment = lambda topk_ids, *_, **__: (None, topk_ids.reshape(-1), None)
triton_moe.try_get_optimal_moe_config = lambda *_, **__: {}
triton_moe.TritonExperts.activation = activation
triton_moe.TritonExperts.moe_sum = lambda self, given, out, *_: out.copy_(given.sum(1))
PunicaWrapperCPU.add_lora_w13, PunicaWrapperCPU.add_lora_w2 = lora_w13, lora_w2
type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: 8)


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = LLM(
        model=question["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=2,
        max_logprobs=-1,
        enable_mixed_moe_lora_format=question["mixed"],
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(temperature=0, max_tokens=question["tokens"], logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    answers: dict[str, object] = {}
    for number, adapter in enumerate([None, *question["adapters"]]):
        request = adapter and LoRARequest(adapter["name"], number, adapter["path"], is_3d_lora_weight=adapter["is_3d"])
        name = adapter["name"] if adapter else "base"
        try:
            if request:
                engine.llm_engine.add_lora(request)
        except (ValueError, AssertionError) as refusal:
            answers[name] = {"refused": repr(refusal)}
            continue
        outputs = [made.outputs[0] for made in engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)]
        answers[name] = [
            {
                "ids": list(made.token_ids),
                "logprobs": [[step[i].logprob for i in range(len(step))] for step in made.logprobs],
            }
            for made in outputs
        ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
