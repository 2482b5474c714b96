"""What `triton.py` does to a chunk of logits, in plain PyTorch: for CPUs, and for machines without triton.

R  rows of a chunk    V  vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule


def forward(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    rule: Rule,
    objective: Objective,
    rows: Rows,
    gradient: bool,
) -> None:
    """Fill `rows` (slices of R) and, with `gradient`, replace the logits by the gradient of the objective."""
    ignored_R = targets_R == rule.ignore_index
    index_R1 = targets_R.masked_fill(ignored_R, 0).long().unsqueeze(-1)
    x_RV = _biased(logits_RV, bias_V)
    v_RV = _capped(x_RV, rule)
    k = _factor(rule)
    largest_R1 = v_RV.amax(-1, keepdim=True)
    d_RV = (v_RV - largest_R1) * k
    log_total_R1 = d_RV.logsumexp(-1, keepdim=True)
    hits_R = (v_RV.gather(-1, index_R1) >= largest_R1).float()
    log_p_RV = d_RV - log_total_R1
    found = Rows(
        logps_N=log_p_RV.gather(-1, index_R1),
        entropy_N=_entropy(log_p_RV) if rows.entropy_N.numel() else rows.entropy_N,
        logsumexp_N=largest_R1 * k + log_total_R1,
        largest_N=largest_R1,
        log_total_N=log_total_R1,
        mean_logp_N=log_p_RV.mean(-1) if rows.mean_logp_N.numel() else rows.mean_logp_N,
        hits_N=hits_R,
        factors_N=rows.factors_N,
    )
    for target, value in zip(rows, found, strict=True):
        if target.numel():
            target.copy_(value.reshape(target.shape).masked_fill(ignored_R, 0.0))
    if not gradient:
        return
    weight_R1 = torch.full_like(largest_R1, objective.factor * rule.scale / rule.temperature)
    if objective.token_weights_N is not None:
        weight_R1 = weight_R1 * objective.token_weights_N.float().unsqueeze(-1)
    constant_R1 = weight_R1 * (1 + 2 * objective.z_loss * found.logsumexp_N)
    grad_RV = log_p_RV.exp_().mul_(constant_R1)
    if objective.smoothing:
        grad_RV -= weight_R1 * (objective.smoothing / v_RV.shape[-1])
    grad_RV.scatter_add_(-1, index_R1, weight_R1 * (objective.smoothing - 1))
    _write(logits_RV, grad_RV, x_RV, ignored_R, rule)


def backward(
    logits_RV: Tensor, bias_V: Tensor | None, targets_R: Tensor, rule: Rule, coefficients: Coefficients
) -> None:
    """Replace the logits by the gradient that the coefficients (slices of R) say."""
    ignored_R = targets_R == rule.ignore_index
    index_R1 = targets_R.masked_fill(ignored_R, 0).long().unsqueeze(-1)
    x_RV = _biased(logits_RV, bias_V)
    largest_R1, log_total_R1, constant_R1, slope_R1, at_target_R1 = (c.unsqueeze(-1) for c in coefficients)
    log_p_RV = (_capped(x_RV, rule) - largest_R1) * _factor(rule) - log_total_R1
    if coefficients.slope_N.numel():
        constant_RV = constant_R1 + slope_R1 * log_p_RV.masked_fill(log_p_RV == -math.inf, 0.0)
        grad_RV = log_p_RV.exp() * constant_RV
    else:
        grad_RV = log_p_RV.exp_().mul_(constant_R1)
    grad_RV.scatter_add_(-1, index_R1, at_target_R1)
    _write(logits_RV, grad_RV.mul_(rule.scale / rule.temperature), x_RV, ignored_R, rule)


def scale(source: Tensor, factors: Tensor, out: Tensor) -> None:
    """`out` = each row of `source` times its factor."""
    torch.mul(source.float(), factors.unsqueeze(-1) if factors.ndim else factors, out=out)


def _biased(logits_RV: Tensor, bias_V: Tensor | None) -> Tensor:
    return logits_RV.float() if bias_V is None else logits_RV.float() + bias_V.float()


def _capped(x_RV: Tensor, rule: Rule) -> Tensor:
    return torch.tanh(x_RV * (rule.scale / rule.softcap)) * rule.softcap if rule.softcap > 0 else x_RV


def _factor(rule: Rule) -> float:
    return (1.0 if rule.softcap > 0 else rule.scale) / rule.temperature


def _entropy(log_p_RV: Tensor) -> Tensor:
    return -(log_p_RV.exp() * log_p_RV.masked_fill(log_p_RV == -math.inf, 0.0)).sum(-1)


def _write(logits_RV: Tensor, grad_RV: Tensor, x_RV: Tensor, ignored_R: Tensor, rule: Rule) -> None:
    if rule.softcap > 0:
        grad_RV.mul_(torch.cosh(x_RV * (rule.scale / rule.softcap)).square_().reciprocal_())
    logits_RV.copy_(grad_RV.masked_fill_(ignored_R.unsqueeze(-1), 0.0))
