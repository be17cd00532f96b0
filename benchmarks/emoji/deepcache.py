"""DeepCache with a guide: a whole evaluation every N steps, and shallow ones in between.

DeepCache (Ma, Fang, Wang: "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024, section 3.2) caches the
feature that enters the last layers of the last up block.  The steps in between compute only the outer layers: the first
layers of the encoder, whose skips those last layers read, and the last layers themselves.  ``branch`` is their number.
With a guide, its context and the summary of the mid block are cached too, and the adapters of the recomputed skips
still run.  A shallow evaluation right after a whole one with the same inputs gives the same prediction.

    python -m benchmarks.emoji.deepcache measure      # images and multiply-accumulates, at any load of the machine
    python -m benchmarks.emoji.deepcache time         # latency on ONNX Runtime, into the same record; an idle machine
    python -m benchmarks.emoji.deepcache report       # write docs/deepcache.md from the record
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.bench.measure.cost import count
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.build.onnx_export import export
from pnp_trt.bundle.store import write_json
from pnp_trt.models.bases import resolve
from pnp_trt.models.catalog import guide_folder
from pnp_trt.models.guides import Features, GuideInput, TinyGuide
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.guides.tiny import SkipAdapter, adapt
from pnp_trt.models.student import encode

from ..cpu_steps import Step
from ..cpu_steps import measure as interleaved
from . import compare
from .cells import TEACHER
from .compare import Ranked
from .measures import Shots, real_images
from .provenance import machine
from .runner import captions
from .sampler import Guidance, Sampler

SCHEMA = "pnp-trt/deepcache/1"
RESULTS = Path("benchmarks/results/deepcache-emoji.json")
PAGE = Path("docs/deepcache.md")
W = 3.0
GUIDED, CFG = "guided", "cfg"


def _layers(block: Any, x: Tensor, emb: Tensor, text: Tensor | None, number: int) -> Tensor:
    """One layer of a block: its residual block, and its attention if it has one."""
    x = block.resnets[number](x, emb)
    if hasattr(block, "attentions"):
        x = block.attentions[number](x, encoder_hidden_states=text, return_dict=False)[0]
    return x


class Whole(nn.Module):
    """An evaluation of a U-Net, with or without a guide, that also returns the cached inputs of a shallow one.

    Args:
        guide: a tiny guide that writes into every skip; None for the plain prediction.
        branch: layers of the last up block that a shallow evaluation computes.
    """

    def __init__(self, unet: Any, guide: TinyGuide | None, branch: int) -> None:
        super().__init__()
        self.unet, self.guide, self.branch = unet, guide, branch

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The prediction ``[B, C, H, W]``, the deep feature, and with a guide its context and summary."""
        emb, features = encode(self.unet, sample, timestep, encoder_hidden_states)
        cached: tuple[Tensor, ...] = ()
        if self.guide is not None:
            assert guidance is not None
            guide = self.guide
            guide_input = GuideInput(sample, timestep, encoder_hidden_states, guidance, features, None, None, None)
            summary = guide.summary(guide_input)
            emb_w = guide.embedding(timestep, guidance, sample.dtype) + summary
            films = guide.modulation(emb_w, [len(maps) for maps in guide.groups(features)])
            context = guide.through_trunk(guide.deep_context(guide_input), films[: len(guide.trunk)])
            added = guide.residuals(guide_input, context, films[len(guide.trunk) :])
            skips = [s if r is None else s + r for s, r in zip(features.down_block_res_samples,
                                                              added.down_block_res_samples, strict=True)]  # fmt: skip
            features = Features(tuple(skips), features.mid_block_res_sample + added.mid_block_res_sample)
            cached = (context, summary)
        x, skips = features.mid_block_res_sample, list(features.down_block_res_samples)
        for block in self.unet.up_blocks[:-1]:
            read, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            more = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
            x = block(hidden_states=x, temb=emb, res_hidden_states_tuple=tuple(read), **more)
        last = self.unet.up_blocks[-1]
        deep = x
        for number in range(len(last.resnets)):
            if number == len(last.resnets) - self.branch:
                deep = x
            x = _layers(last, torch.cat([x, skips.pop()], 1), emb, encoder_hidden_states, number)
        return (self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(x))), deep, *cached)


class Shallow(nn.Module):
    """The evaluation between two whole ones; arguments as in :class:`Whole`."""

    def __init__(self, unet: Any, guide: TinyGuide | None, branch: int) -> None:
        super().__init__()
        self.unet, self.guide, self.branch = unet, guide, branch

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        deep: Tensor,
        guidance: Tensor | None = None,
        context: Tensor | None = None,
        summary: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """The prediction; the text states are read if the outermost blocks have attention."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), None)
        skips = [unet.conv_in(sample)]
        for number in range(self.branch - 1):
            skips.append(_layers(unet.down_blocks[0], skips[-1], emb, encoder_hidden_states, number))
        if self.guide is not None:
            assert guidance is not None and context is not None and summary is not None
            guide = self.guide
            emb_w = guide.embedding(timestep, guidance, sample.dtype) + summary
            film = guide.modulation(emb_w, [len(skips), len(guide.adapters) - len(skips)])[len(guide.trunk)]
            # the gate reads only w and the timestep
            guide_input = GuideInput(
                sample, timestep, context, guidance, Features(tuple(skips), deep), None, None, None
            )
            gate = guide.gate(guide_input, sample.dtype)
            near = nn.functional.interpolate(context, size=skips[0].shape[-2:], mode="nearest")
            adapters = cast(list[SkipAdapter], list(guide.adapters)[: len(skips)])
            added = adapt(adapters, skips, near, film, gate)
            skips = [s + r for s, r in zip(skips, added, strict=True)]
        last, x = unet.up_blocks[-1], deep
        for number in range(len(last.resnets) - self.branch, len(last.resnets)):
            x = _layers(last, torch.cat([x, skips.pop()], 1), emb, encoder_hidden_states, number)
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return out


class Cached:
    """A prediction for ``sampler.denoise``: whole in every ``every``-th step of a batch, shallow in between."""

    def __init__(self, unet: Any, guide: TinyGuide | None, every: int, branch: int) -> None:
        self.whole, self.shallow = Whole(unet, guide, branch), Shallow(unet, guide, branch)
        self.every, self.guided = every, guide is not None
        self._last, self._step, self._kept = -1, 0, ()  # type: int, int, tuple[Tensor, ...]

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        at = int(t[0])
        self._step = (
            0 if at >= self._last else self._step + 1
        )  # timesteps decrease, and a new batch starts at the largest
        self._last = at
        guidance = {"guidance": w} if self.guided else {}
        if self._step % self.every == 0:
            out, *features = self.whole(x, t, text, **guidance)
            self._kept = tuple(features)
            return out
        deep, *more = self._kept
        fed = dict(zip(("context", "summary"), more, strict=True)) if self.guided else {}
        reads = {"encoder_hidden_states": text} if hasattr(self.whole.unet.up_blocks[-1], "attentions") else {}
        shallow: Tensor = self.shallow(x, t, deep, **guidance, **fed, **reads)
        return shallow


@dataclass(frozen=True)
class Cell:
    """One set of images: a method, its steps, and how often an evaluation is whole."""

    method: str
    steps: int
    every: int = 1
    branch: int = 3

    def wholes(self) -> int:
        """Number of whole evaluations of a run; the others are shallow."""
        return -(-self.steps // self.every)


def cells(short: bool = False) -> list[Cell]:
    """DeepCache at 50 and 16 steps, and the same methods with fewer steps, which also saves evaluations.

    Args:
        short: a third of the work: CFG is cached only at N = 3, and only 50 steps are cached.
    """
    if short:
        one = [Cell(CFG, 50), Cell(CFG, 50, 3), Cell(CFG, 25), *(Cell(GUIDED, s) for s in (50, 25, 16))]
        return one + [Cell(GUIDED, 50, every, branch) for every, branch in ((2, 3), (3, 3), (5, 3), (3, 1))]
    rows = [Cell(m, s) for m in (CFG, GUIDED) for s in (50, 25, 16, 10)]
    rows += [Cell(m, 50, every, branch) for m in (CFG, GUIDED) for every, branch in ((2, 3), (3, 3), (5, 3), (3, 1))]
    return rows + [Cell(m, 16, 2) for m in (CFG, GUIDED)]


def arguments_of(unet: Any, guide: TinyGuide | None, branch: int, rows: int) -> tuple[dict[str, Tensor], ...]:
    """Random inputs of a whole evaluation, and of the shallow one after it."""
    config, torch_rows = unet.config, torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(rows, config.in_channels, config.sample_size, config.sample_size, generator=torch_rows),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": torch.randn(rows, 77, config.cross_attention_dim, generator=torch_rows),
    }
    if guide is not None:
        inputs["guidance"] = torch.full((rows,), W)
    with torch.no_grad():
        _, deep, *context_and_summary = Whole(unet, guide, branch)(**inputs)
    between = {k: v for k, v in inputs.items() if k != "encoder_hidden_states"} | {"deep": deep}
    if hasattr(unet.up_blocks[-1], "attentions"):
        between["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    return inputs, between | dict(zip(("context", "summary"), context_and_summary, strict=False))


def macs(unet: Any, guide: TinyGuide) -> dict[str, int]:
    """Multiply-accumulates of one row: ``cfg`` and ``guided``, whole, and shallow by its branch."""
    counts = {}
    for name, used in ((CFG, None), (GUIDED, guide)):
        for branch in (1, 2, 3):
            whole, between = arguments_of(unet, used, branch, 1)
            counts[f"{name} whole"] = count(Whole(unet, used, branch), whole).macs
            counts[f"{name} shallow {branch}"] = count(Shallow(unet, used, branch), between).macs
    return counts


def cost(cell: Cell, of: dict[str, Any]) -> float:
    """Cost of one image's loop, from the cost of each evaluation; CFG's evaluations have two rows."""
    shallow = 0.0 if cell.every == 1 else of[f"{cell.method} shallow {cell.branch}"]
    one: float = cell.wholes() * of[f"{cell.method} whole"] + (cell.steps - cell.wholes()) * shallow
    return one


def models() -> tuple[Any, TinyGuide]:
    """The bundled U-Net and tiny guide."""
    unet, guide = resolve(TEACHER).unet(), load_guide(str(guide_folder("emoji-tiny")))
    assert isinstance(guide, TinyGuide)
    return unet.eval().requires_grad_(False), guide.eval().requires_grad_(False)


def measure(
    images: int, batch: int, cache: Path, judge: Path, results: Path, command: str, extract: Any = None,
    some: Sequence[Cell] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Sample and measure all cells; write the record to ``results`` and return it."""
    unet, guide = models()
    sampler = Sampler(resolve(TEACHER).folder)
    head, extract = AlignmentHead.load(judge), extract or FeatureExtractor("cpu")
    rows = captions("train", images)
    real_pixels = real_images(rows, cache)
    real, concepts = Shots(real_pixels, extract(real_pixels)), [a.concept for a in rows]
    shots: dict[Cell, Ranked] = {}
    for cell in some or cells():
        predict = Cached(unet, None if cell.method == CFG else guide, cell.every, cell.branch)
        pixels = sampler.draw(rows, predict, Guidance(cell.method, W), sampler.schedule(cell.steps), batch)
        shots[cell] = Ranked.of(Shots(pixels, extract(pixels)), concepts, head)
        print(cell, flush=True)
    counted = macs(unet, guide)
    counted |= {name: 2 * n for name, n in counted.items() if name.startswith(CFG)}
    measured = []
    for cell, mine in shots.items():
        teacher = shots[Cell(CFG, cell.steps if cell.every > 1 else max(c.steps for c in shots))]
        row: dict[str, Any] = {**asdict(cell), "macs": cost(cell, counted), **compare.quality(real, [mine])}
        row["to_cfg_whole"] = {"steps": cell.steps if cell.every > 1 else max(c.steps for c in shots),
                               **compare.distance([mine], [teacher]),
                               "gain": compare.gain(real, [teacher], [mine])}  # fmt: skip
        own = Cell(cell.method, cell.steps)
        if cell.every > 1 and own in shots:
            row["to_own_whole"] = compare.distance([mine], [shots[own]]) | {
                "gain": compare.gain(real, [shots[own]], [mine])
            }
        measured.append(row)
    document = {
        "schema": SCHEMA, "provenance": machine(command),
        "settings": {"images": images, "w": W, "sampler": "DDIM, eta 0", "batch": batch},
        "macs": counted, "cells": measured,
    }  # fmt: skip
    write_json(results, document)
    return document


def timed(rounds: int, threads: int, batches: Sequence[int]) -> dict[str, Any]:
    """Seconds of each evaluation on ONNX Runtime's CPU provider, rounds interleaved; by batch."""
    unet, guide = models()
    latencies = {}
    with tempfile.TemporaryDirectory(prefix="pnp-trt-deepcache-") as folder:
        networks: dict[str, tuple[OrtNetwork, dict[str, Tensor], int]] = {}
        for name, used, rows in ((CFG, None, 2), (GUIDED, guide, 1)):
            for branch in (3, 1):
                inputs = arguments_of(unet, used, branch, 2)
                parts: dict[str, nn.Module] = {f"{name} shallow {branch}": Shallow(unet, used, branch)}
                if branch == 3:
                    parts = {f"{name} whole": Whole(unet, used, branch)} | parts
                for part, module in parts.items():
                    arguments = inputs[0] if isinstance(module, Whole) else inputs[1]
                    names = ["prediction", "deep", "new_context", "new_summary"][: 4 if used is not None else 2]
                    path = Path(folder) / f"{part.replace(' ', '-')}.onnx"
                    export(module, arguments, names if isinstance(module, Whole) else "prediction", path)
                    networks[part] = OrtNetwork(path, "cpu", threads), arguments, rows
        for batch in batches:
            steps: dict[str, Step] = {}
            for part, (network, arguments, rows) in networks.items():
                repeated = {k: v[:1].repeat(rows * batch, *[1] * (v.ndim - 1)).numpy() for k, v in arguments.items()}
                steps[part] = _call(network, repeated)
            pairs = [(part, f"{part.split()[0]} whole") for part in networks if "shallow" in part]
            latencies[str(batch)] = interleaved(steps, rounds, [*pairs, (f"{GUIDED} whole", f"{CFG} whole")])
    return {"threads": threads, "rounds": rounds, "batches": latencies}


def _call(network: OrtNetwork, inputs: dict[str, np.ndarray]) -> Step:
    return lambda: network.outputs(**inputs)[0]


def finding(rows: Sequence[dict[str, Any]], slack: float = 0.2) -> str:
    """Sentence on how many rows with DeepCache are matched by fewer steps at no more cost and as close to CFG.

    Args:
        rows: cells of a record.
        slack: tolerance of PSNR in dB.
    """
    cached = [r for r in rows if r["every"] > 1]

    def psnr(row: dict[str, Any]) -> float:
        value: float = row["to_cfg_whole"]["psnr_db"]["value"]
        return value

    beaten = [
        r
        for r in cached
        if any(
            o["method"] == r["method"] and o["every"] == 1 and o["steps"] < r["steps"] and o["macs"] <= r["macs"]
            and psnr(o) >= psnr(r) - slack
            for o in rows
        )
    ]  # fmt: skip
    return (
        f"Of the {len(cached)} rows with DeepCache, {len(beaten)} can be matched by the same method with fewer "
        f"steps, no more MACs, and a PSNR to CFG at most {slack:g} dB lower."
        + (" DeepCache is therefore not an option of the sampler." if len(beaten) == len(cached) else "")
    )


def page(document: dict[str, Any]) -> str:
    """Render the record as ``docs/deepcache.md``."""
    settings, stated, counted = document["settings"], document["provenance"], document["macs"]
    rows = {(c["method"], c["steps"], c["every"], c["branch"]): c for c in document["cells"]}
    whole = rows[CFG, 50, 1, 3]["macs"]
    times = document.get("latency", {}).get("batches", {}).get("1")
    middle = {} if times is None else {name: float(np.median(t)) for name, t in times["seconds"].items()}
    lines = [
        "# DeepCache with a guide",
        "",
        "Written by `python -m benchmarks.emoji.deepcache report` from `benchmarks/results/deepcache-emoji.json` "
        f"(`{stated['command']}`, {stated['date'][:10]}).",
        "",
        "[DeepCache](https://arxiv.org/abs/2312.00858) evaluates the whole U-Net in every N-th step and caches the "
        "feature that enters the last layers of the last up block; in the steps between, only the outermost layers are "
        "computed. With a guide, the guide's context and its summary of the mid block are cached too, and the adapters "
        "of the recomputed skips still run. Branch 3 recomputes the whole last up block, branch 1 only its last layer.",
        "",
        f"The bundled model and tiny guide, w = {settings['w']:g}, {settings['sampler']}, {settings['images']} "
        "trained captions, one set of noise; intervals are 95 %. PSNR is to CFG with 50 steps; in rows with DeepCache, "
        "to CFG without it at the same number of steps. MACs are those of the loop, relative to CFG with 50 steps. "
        "*Gain* is the paired gain in KID over the same method with only whole evaluations; below 0 is worse.",
        "",
        "| method | steps | N, branch | MACs |"
        + (" ms |" if middle else "")
        + " KID ↓ | gain in KID | R@1, % | PSNR, dB |",
        "|---|---:|---|---:|" + ("---:|" if middle else "") + "---|---|---:|---:|",
    ]
    for c in sorted(document["cells"], key=lambda c: (c["method"], -c["steps"], c["every"], -c["branch"])):
        cell = Cell(c["method"], c["steps"], c["every"], c["branch"])
        gain = c.get("to_own_whole", {}).get("gain", {}).get("kid")
        kid, psnr = c["kid"], c["to_cfg_whole"]["psnr_db"]["value"]
        lines.append(
            f"| {'CFG' if cell.method == CFG else 'guide'} | {cell.steps} | "
            + ("–" if cell.every == 1 else f"{cell.every}, {cell.branch}")
            + f" | {c['macs'] / whole:.3f} |"
            + (f" {1000 * cost(cell, middle):.0f} |" if middle else "")
            + f" {kid['value']:.4f} [{kid['low']:.4f}, {kid['high']:.4f}] | "
            + ("–" if gain is None else f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")
            + f" | {100 * c['R@1']['value']:.1f} | {'–' if not np.isfinite(psnr) or psnr > 90 else f'{psnr:.1f}'} |"
        )
    share = counted["guided shallow 3"] / counted["guided whole"], counted["guided shallow 1"] / counted["guided whole"]
    lines += [
        "",
        finding(document["cells"]),
        "",
        f"A shallow evaluation with the guide takes {100 * share[0]:.1f} % of a whole one's MACs at branch 3 and "
        f"{100 * share[1]:.1f} % at branch 1.",
    ]
    if times is not None:
        lines += [
            "",
            "Milliseconds are for the loop of one image on ONNX Runtime's CPU provider, from the median time of each "
            f"kind of evaluation in {document['latency']['rounds']} interleaved rounds "
            f"(threads: {document['latency']['threads']}).",
        ]
    if len([c for c in document["cells"] if c["every"] > 1 and c["steps"] == 50]) < 8:
        short = (
            "This run was short: CFG with DeepCache was measured only at N = 3. KID of so few images is uncertain; its "
        )
        lines += ["", short + "paired gains can be compared."]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.deepcache", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("measure")
    one.add_argument("--images", type=int, default=256)
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--short", action="store_true", help="a third of the cells")
    one.add_argument("--cache", type=Path, default=Path("build/emoji"))
    one.add_argument("--judge", type=Path, default=Path("pnp_trt/assets/judge.safetensors"))
    two = what.add_parser("time")
    two.add_argument("--rounds", type=int, default=40)
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    three = what.add_parser("report")
    three.add_argument("--document", type=Path, default=PAGE)
    for each in (one, two, three):
        each.add_argument("--json", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    if a.what == "measure":
        words = ["python", "-m", "benchmarks.emoji.deepcache", "measure", "--images", str(a.images)]
        words += ["--short"] if a.short else []
        measure(a.images, a.batch, a.cache, a.judge, a.json, shlex.join(words), some=cells(a.short))
        return
    document = json.loads(a.json.read_text(encoding="utf-8"))
    if a.what == "time":
        words = ["python", "-m", "benchmarks.emoji.deepcache", "time", "--rounds", str(a.rounds)]
        latency = timed(a.rounds, a.threads, a.batches)
        write_json(a.json, document | {"latency": {"provenance": machine(shlex.join(words)), **latency}})
        return
    a.document.write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    main()
