"""DeepCache with a guide: shallow and whole evaluations of the same inputs are equal; their order, cost and page."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.emoji.deepcache import (
    CFG,
    GUIDED,
    Cached,
    Cell,
    Shallow,
    Whole,
    arguments_of,
    cells,
    cost,
    finding,
    page,
)
from pnp_trt.models.guides import TinyGuide
from pnp_trt.models.student import Student, Teacher

from ..models.test_student import awake, example, small_unet

OUTER_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def guided(unet: Any) -> TinyGuide:
    return awake(TinyGuide.from_unet(unet, rank=4, embed_dim=8, text=True)).eval()


@pytest.mark.parametrize("blocks", [{}, OUTER_ATTENTION])
@pytest.mark.parametrize("branch", [1, 2])
@torch.no_grad()
def test_a_shallow_evaluation_of_the_same_inputs_equals_the_whole_one(branch: int, blocks: dict[str, Any]) -> None:
    unet = small_unet(**blocks)
    guide = guided(unet)
    x, t, text = example()
    w = torch.tensor([1.5, 3.0, 8.0])
    for used, reference in ((None, Teacher(unet)(x, t, text)), (guide, Student(unet, guide)(x, t, text, w))):
        extra = {} if used is None else {"guidance": w}
        out, deep, *cached = Whole(unet, used, branch)(x, t, text, **extra)
        torch.testing.assert_close(out, reference)
        reads = {"encoder_hidden_states": text} if blocks else {}
        extra |= dict(zip(("context", "summary"), cached, strict=False))
        again = Shallow(unet, used, branch)(x, t, deep, **extra, **reads)
        torch.testing.assert_close(again, reference)
        other = Shallow(unet, used, branch)(x + 1, t, deep, **extra, **reads)
        assert not torch.allclose(other, reference, atol=1e-3)  # the recomputed layers use the new latents
    assert not torch.allclose(Student(unet, guide)(x, t, text, w), Teacher(unet)(x, t, text), atol=1e-3)


@torch.no_grad()
def test_every_third_evaluation_is_whole_and_each_batch_starts_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()
    predict = Cached(unet, guided(unet), every=3, branch=1)
    x, _, text = example()
    evaluations: list[str] = []
    predict.whole.register_forward_hook(lambda *_: evaluations.append("whole"))
    predict.shallow.register_forward_hook(lambda *_: evaluations.append("shallow"))
    for _ in range(2):
        for at in (900, 700, 500, 300, 100):
            predict(x, torch.full((3,), at), text, torch.full((3,), 3.0))
    assert evaluations == ["whole", "shallow", "shallow", "whole", "shallow"] * 2


def test_cost_of_a_sampling_loop() -> None:
    macs = {"cfg whole": 2.0, "cfg shallow 3": 0.5, "guided whole": 1.0}
    assert cost(Cell(CFG, 16, 3), macs) == 6 * 2.0 + 10 * 0.5  # steps 0, 3, … 15 are whole
    assert cost(Cell(GUIDED, 16), macs) == 16
    assert {(c.every, c.branch) for c in cells() if c.every > 1} and len(set(cells())) == len(cells())


def test_inputs_of_whole_and_shallow_evaluations() -> None:
    unet = small_unet()
    whole, between = arguments_of(unet, guided(unet), 1, 2)
    assert set(between) == {"sample", "timestep", "guidance", "deep", "context", "summary"}
    assert set(whole) == {"sample", "timestep", "guidance", "encoder_hidden_states"} and between["deep"].shape[0] == 2


def test_the_page_has_a_row_for_each_cell() -> None:
    number = {"value": 0.1, "low": 0.0, "high": 0.2}

    def row(method: str, every: int) -> dict[str, Any]:
        own = {} if every == 1 else {"to_own_whole": {"gain": {"kid": number}}}
        return {"method": method, "steps": 50, "every": every, "branch": 3, "macs": 100 // every, "kid": number,
                "R@1": number, "to_cfg_whole": {"psnr_db": {"value": 30.0}}, **own}  # fmt: skip

    names = [f"{method} {part}" for method in (CFG, GUIDED) for part in ("whole", "shallow 1", "shallow 3")]
    document = {
        "settings": {"w": 3.0, "sampler": "DDIM", "images": 4}, "provenance": {"command": "c", "date": "2026-01-01"},
        "macs": dict.fromkeys(names, 10), "cells": [row(m, n) for m in (CFG, GUIDED) for n in (1, 2)],
        "latency": {"threads": 1, "rounds": 3, "batches": {"1": {"seconds": {n: [0.002] * 3 for n in names}}}},
    }  # fmt: skip
    text = page(document)
    assert "| guide | 50 | 2, 3 | 0.500 | 100 |" in text and "| CFG | 50 | – | 1.000 | 100 |" in text
    assert text.count("| 50 |") == 4


def test_deepcache_is_compared_with_fewer_steps() -> None:
    def row(steps: int, every: int, macs: int, psnr: float, method: str = GUIDED) -> dict[str, Any]:
        return {"method": method, "steps": steps, "every": every, "macs": macs,
                "to_cfg_whole": {"psnr_db": {"value": psnr}}}  # fmt: skip

    cached = [row(50, 2, 60, 30.0), row(50, 5, 30, 31.0), row(50, 3, 60, 29.0, CFG)]
    fewer = [row(25, 1, 50, 29.9), row(16, 1, 20, 29.0), row(50, 1, 100, 99.0)]
    assert finding(cached + fewer).startswith("Of the 3 rows with DeepCache, 1 can be matched")
