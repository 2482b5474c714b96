"""Run in a process of its own, with Triton's interpreter on: the kernels under the plugin, without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from mixtures import EXPERTS, assembled, gradients, logps
from pegbox.testing.tiny import tiny_batches
from pegbox_kernels.dispatch import runs_kernels

LORA: dict[str, Any] = {"lora": {"r": 4, "alpha": 8.0, "targets": ["q_proj"], "parameters": EXPERTS}}


def compare(kind: str, plugins: list[str], **sections: Any) -> None:
    """Raise unless losses and gradients are those of transformers and PEFT."""
    batch = tiny_batches(rows=2)[0]
    plain, ours = (assembled(kind, [*plugins, *more], **sections)[0] for more in ([], ["scattermoe"]))
    torch.testing.assert_close(logps(ours, batch), logps(plain, batch), rtol=1e-5, atol=1e-5)
    expected, found = gradients(plain, batch), gradients(ours, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert runs_kernels(torch.empty(0)), "the interpreter is off"
    compare("gpt_oss", ["lora"], **LORA)
    compare("qwen3_moe", ["lora"], **LORA)
    compare("gpt_oss", [])
