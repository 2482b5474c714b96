"""Triton kernels for fine-tuning, each beside a plain PyTorch reference.

One directory is one operation: `reference.py` says what it computes, `triton.py` computes it fast,
`__init__.py` is what one calls, `spec.py` is the record that its tests and its benchmark iterate over,
`README.md` holds the arithmetic. The package needs torch alone (and triton for a GPU); it knows nothing of
Pegbox.

    from pegbox_kernels.logprob import token_logprobs
"""

__version__ = "0.1.0"
