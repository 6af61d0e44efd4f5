"""What every layout of a cut model must show."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM

from topiarist.structured import gates, plan_layout, predicted_parameters, shrunk

NO_HEADS = {"opt", "gpt2", "gpt_neox", "stablelm"}
"""Their configs cannot state fewer heads of the same size."""
ONE_NORM = {"olmo2", "olmoe"}
"""A norm spans all heads: removing some is not exact."""


def random_scores(groups, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.key: torch.rand(group.count, generator=generator) for group in groups}


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def masked_logits(model, groups, kept, tokens) -> torch.Tensor:
    with gates(model, groups) as masks:
        masks.update({key: mask.float() for key, mask in kept.items()})
        return model(tokens, use_cache=False).logits


@torch.no_grad()
def check(
    model, groups, kept, layout: str, folder: Path, *, opened=AutoModelForCausalLM.from_pretrained, tokens=None
) -> None:
    """Logits before and after a reload, cached generation, the number of parameters, the model left as it was."""
    tokens = tiny.tiny_tokens(2, 12) % model.get_input_embeddings().num_embeddings if tokens is None else tokens
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = masked_logits(model, groups, kept, tokens)
    plan = plan_layout(model, groups, kept, layout, max_waste=9.0)
    small = shrunk(model, groups, kept, plan)
    torch.testing.assert_close(small(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    predicted = predicted_parameters(parameters(model), groups, kept, plan.slots)
    assert predicted["stored"] == predicted["kept"] or layout == "padded"
    assert parameters(small) == predicted["stored"]
    small.save_pretrained(folder)
    again = opened(folder).eval()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert parameters(again) == predicted["stored"]
    assert again.config.to_dict().keys() == small.config.to_dict().keys()
    generated = [again.generate(tokens[:, :4], max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*generated)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def kinds_of(family: str, layout: str) -> tuple[str, ...]:
    none = family in ONE_NORM or (layout == "uniform" and family in NO_HEADS)
    return ("channels",) if none else ("kv_groups", "channels")
