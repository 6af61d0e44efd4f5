"""REAP and REAM token by token, expert by expert, for models like Mixtral.

T  tokens     E  experts of a layer     every expert is act(x gate^T) * (x up^T), times down^T
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert(experts, number: int, x: Tensor) -> Tensor:
    """What one expert makes of one token (width,)."""
    gate, up = experts.gate_up_proj[number].double().chunk(2)
    return experts.down_proj[number].double() @ (experts.act_fn(gate @ x) * (up @ x))


def routed(router, x: Tensor) -> dict[int, float]:
    """{expert: weight} of one token: the softmax over all experts, the largest of it, divided by their sum."""
    shares = (router.weight.double() @ x).softmax(0)
    best = shares.topk(router.top_k)
    return {int(e): float((v / best.values.sum()).detach()) for e, v in zip(best.indices, best.values, strict=True)}


def reap(mixer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(score, tokens) of every expert: arXiv 2510.13999. hidden (T, width)."""
    count = len(mixer.experts.gate_up_proj)
    added: list[list[float]] = [[] for _ in range(count)]
    for x in hidden.double():
        for number, weight in routed(mixer.gate, x).items():
            added[number].append(weight * float(expert(mixer.experts, number, x).norm()))
    means = [sum(values) / len(values) if values else 0.0 for values in added]
    return torch.tensor(means, dtype=torch.float64), torch.tensor([len(values) for values in added])


def likeness(mixer, hidden: Tensor) -> Tensor:
    """Of every two experts: the mean of two cosines, of outputs times probability and of logits, over all tokens."""
    count = len(mixer.experts.gate_up_proj)
    logits = torch.stack([mixer.gate.weight.double() @ x for x in hidden.double()])
    outputs = [
        torch.cat([logits[t].softmax(0)[e] * expert(mixer.experts, e, x) for t, x in enumerate(hidden.double())])
        for e in range(count)
    ]
    alike = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            both = torch.dot(outputs[i], outputs[j]) / (outputs[i].norm() * outputs[j].norm())
            both += torch.dot(logits[:, i], logits[:, j]) / (logits[:, i].norm() * logits[:, j].norm())
            alike[i, j] = both / 2
    return alike
