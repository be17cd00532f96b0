"""Compare a step LoRA for CFG in 8 steps, and a guide for the U-Net with it, against the guide of stage 2.

``python -m benchmarks.emoji.step_lora measure --from FOLDER`` measures the outputs of ``gpu_train train --step-lora``
and ``gpu_train guides``; ``report`` writes ``docs/step-lora.md`` from the JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import time
from pathlib import Path
from typing import Any

from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.build.swap.lora import LayerNames, Lora, load, merge
from pnp_trt.bundle.store import digest, sha256, write_json, write_text
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.catalog import guide_folder
from pnp_trt.models.guides.load import load_guide

from ..records import add_sampling_options, machine_said, read
from . import compare
from .cells import TEACHER
from .compare import Ranked, outcome
from .measures import Shots, real_images
from .network import FLOAT32, Network
from .provenance import machine, relative
from .runner import captions
from .sampler import Guidance, Sampler
from .tables_report import DASH, marked, number, recall_of, table

SCHEMA = "pnp-trt/emoji-step-lora/1"
RESULTS = Path("benchmarks/results/emoji-step-lora.json")
DOCUMENT = Path("docs/step-lora.md")
STEPS, MANY = 8, 50
SCALES = (3.0, 5.0)
CFG, CFG_MANY, NONE = "cfg", "cfg-50", "none"
#: method → (its name in the table, kind of guidance, steps)
METHODS = {
    CFG_MANY: ("CFG", "cfg", MANY),
    CFG: ("CFG", "cfg", STEPS),
    "cfg+lora": ("CFG, step LoRA", "cfg", STEPS),
    NONE: ("no guidance", "none", STEPS),
    "tiny": ("tiny guide of stage 1", "guided", STEPS),
    "tiny-8": ("tiny guide of stage 2", "guided", STEPS),
    "tiny+lora": ("tiny guide, step LoRA", "guided", STEPS),
}

TEXT = """# A LoRA for few steps, and a guide for it

Written by `python -m benchmarks.emoji.step_lora report` from `{source}`, which was made by
`{command}` ({date}, {machine}, torch {torch}).

Stage 2 of the distillation halves the steps of a *guide*. Here its loss (Salimans & Ho 2022, algorithm 2) trains a
*LoRA* of the U-Net instead, with classifier-free guidance (CFG) in the steps of both teacher and student: from 32 to 16
to 8 steps, with rank {rank} and {lora_steps} optimizer steps of {lora_batch} trajectories for the last halving. CFG is
kept: the U-Net with the LoRA still takes w and negative prompts. The LoRA is then merged, and a tiny guide is trained
for the merged U-Net on states of 8-step trajectories ({guide_steps} optimizer steps of {batch} states). The budgets are
not equal: the bundled guide of stage 1 was trained for {tiny_steps} such steps, and the stage-2 guide for 8 steps was
trained from it with {stage2_steps} more steps of {stage2_batch} states for each halving. The LoRA has PEFT's keys, so
`pnp-trt plug --lora` can merge it.

Each row has {images} images of trained captions from one set of noise; there is one training seed. KID, R@1 and
distance are defined in [the tables](distillation-tables.md). Distance is to CFG's images at {many} steps. Gains are
paired by caption and noise; above 0 is better. Brackets are 95 % intervals; ▲ and ▼ mark gains and losses whose
interval excludes 0.

{found}

{rows}
"""


class Measurer:
    """Samples each method at each w, caches the images under ``cache``, and measures them.

    Args:
        source: folder of ``step-lora-8.safetensors``.
        guides: folder of the guide ``step-lora-8``.
    """

    def __init__(
        self, source: Path, guides: Path, judge: Path, cache: Path, images: int, device: str, batch: int
    ) -> None:  # fmt: skip
        self.cache, self.images, self.batch = cache / "step-lora", images, batch
        self.head, self.extract = AlignmentHead.load(judge), FeatureExtractor(device)
        self.sampler = Sampler(resolve(TEACHER).folder, device=device)
        self.rows = captions("train", images)
        self.lora_file = source / f"step-lora-{STEPS}.safetensors"
        if not self.lora_file.is_file():
            raise InputError(
                f"{self.lora_file} does not exist; run: python -m benchmarks.emoji.gpu_train train --step-lora 105"
            )
        folders = {
            "tiny": guide_folder("emoji-tiny"), "tiny-8": guide_folder("emoji-tiny-8"),
            "tiny+lora": guides / f"step-lora-{STEPS}",
        }  # fmt: skip
        self.guides = {name: load_guide(str(path)).to(device) for name, path in folders.items()}
        weights = {n: sha256(path / "diffusion_pytorch_model.safetensors") for n, path in folders.items()}
        self.hashes = {"lora": sha256(self.lora_file), **weights}
        self.with_lora = copy.deepcopy(self.sampler.unet)
        lora = load(Lora.parse(str(self.lora_file)), LayerNames({"unet": self.with_lora}))
        merge(self.with_lora, "unet", [lora])

    def shots(self, method: str, w: float) -> Shots:
        """The images of a method, sampled unless they are cached."""
        _, kind, steps = METHODS[method]
        how = Guidance(kind, 1.0 if kind == "none" else w)
        unet = self.with_lora if method.endswith("+lora") else self.sampler.unet
        key = digest([method, how.w, steps, self.hashes, self.images, self.batch, self.sampler.device])

        def make() -> Any:
            network = Network(unet, self.guides.get(method), FLOAT32, False, self.batch)
            return self.sampler.draw(self.rows, network, how, self.sampler.schedule(steps), self.batch)

        return Shots.cached(self.cache / f"{method}-{w:g}-{key[:12]}.npz", make, self.extract)

    def measure(self, rendered: Path) -> list[dict[str, Any]]:
        """Measure all methods at all scales."""
        real = real_images(self.rows, rendered)
        artists, concepts = Shots(real, self.extract(real)), [a.concept for a in self.rows]
        rows = []
        for w in SCALES:
            at = {m: Ranked.of(self.shots(m, w), concepts, self.head) for m in METHODS}
            for m, (_, kind, steps) in METHODS.items():
                row = {"method": m, "w": w, "steps": steps, "evaluations": steps * (2 if kind == "cfg" else 1)}
                row |= compare.quality(artists, [at[m]])
                if m != CFG_MANY:
                    row["distance_to_cfg"] = compare.distance([at[m]], [at[CFG_MANY]])
                    row["gain_over"] = {
                        other: compare.gain(artists, [at[other]], [at[m]])
                        for other in (CFG_MANY, CFG, "tiny-8") if other != m
                    }  # fmt: skip
                rows.append(row)
        return rows


def measure(
    source: Path, guides: Path, judge: Path, cache: Path, results: Path, images: int, device: str, batch: int,
    command: str,
) -> dict[str, Any]:  # fmt: skip
    """Sample and measure; write the record to ``results`` and return it.

    Raises:
        InputError: if weights are missing, or for fewer than 4 images.
    """
    if images < 4:
        raise InputError(f"images must be at least 4, got {images}")
    facts, begun = machine(command), time.monotonic()
    measurer = Measurer(source, guides, judge, cache, images, device, batch)
    rows = measurer.measure(cache)
    parts = json.loads((source / "train.json").read_text())["parts"]
    trained = {
        name: json.loads((guide_folder(name) / "distill.json").read_text())["settings"]["train"]
        for name in ("emoji-tiny", "emoji-tiny-8")
    }
    document = {
        "schema": SCHEMA,
        "provenance": facts | {"weights_sha256": measurer.hashes, "judge_sha256": measurer.head.sha256},
        "settings": {"images": images, "device": device, "batch": batch, "sampler": "DDIM, eta 0",
                     "seconds": round(time.monotonic() - begun, 1)},
        "training": {k: {n: v for n, v in p.items() if n != "log"} for k, p in parts.items() if "step lora" in k},
        "bundled": trained,
        "rows": rows,
    }  # fmt: skip
    write_json(results, document)
    return document


def _gain(row: dict[str, Any], other: str) -> str:
    gain = row.get("gain_over", {}).get(other)
    return DASH if gain is None else marked(gain["kid"])


def finding(rows: list[dict[str, Any]]) -> str:
    """Sentences that compare the step LoRA's two rows with stage 2's guide and CFG in the same number of steps."""
    names, lines = {m: name for m, (name, _, _) in METHODS.items()}, []
    phrases = {
        "better": "shown to be better than",
        "worse": "shown to be worse than",
        "no difference shown": "not shown to differ from",
    }
    for row in rows:
        against = {"tiny+lora": (CFG, "tiny-8"), "cfg+lora": (CFG,)}.get(row["method"], ())
        for other in against:
            kid = outcome(row["gain_over"][other]["kid"])
            recall = outcome(row["gain_over"][other]["R@1"])
            lines.append(
                f"- At w = {row['w']:g} and {STEPS} steps, *{names[row['method']]}* is {phrases[kid]} *{names[other]}* "
                f"by KID, and is {phrases[recall]} it by R@1."
            )
    return "\n".join(lines)


def page(document: dict[str, Any], source: Path = RESULTS) -> str:
    """Render the record as a page."""
    stated, training = document["provenance"], document["training"]
    lora, guide = training[f"step lora {STEPS}"], training["guide step lora"]
    bundled, blocks = document["bundled"], []
    for w in dict.fromkeys(r["w"] for r in document["rows"]):
        rows = [
            [METHODS[r["method"]][0], str(r["steps"]), str(r["evaluations"]), number(r["kid"]), recall_of(r, 1),
             number(r.get("distance_to_cfg", {}).get("psnr_db"), 1), _gain(r, CFG), _gain(r, "tiny-8")]
            for r in document["rows"] if r["w"] == w
        ]  # fmt: skip
        head = ("method", "steps", "evaluations", "KID ↓", "R@1, % ↑", "PSNR, dB ↑",
                f"KID gain over CFG, {STEPS} steps ↑", "KID gain over stage 2 ↑")  # fmt: skip
        blocks.append(f"**w = {w:g}**\n\n{table(head, rows)}")
    return TEXT.format(
        source=source.as_posix(), command=stated["command"], date=stated["date"][:10], machine=machine_said(document),
        torch=stated["versions"]["torch"], rank=lora["rank"], lora_steps=lora["steps"], lora_batch=lora["batch"] // 2,
        guide_steps=guide["steps"], batch=guide["batch"], tiny_steps=f"{bundled['emoji-tiny']['steps']:,}",
        stage2_steps=f"{bundled['emoji-tiny-8']['steps']:,}", stage2_batch=bundled["emoji-tiny-8"]["batch"], many=MANY,
        images=document["settings"]["images"], found=finding(document["rows"]), rows="\n\n".join(blocks),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.step_lora", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_subparsers(dest="what", required=True)
    one, two = what.add_parser("measure"), what.add_parser("report")
    one.add_argument(
        "--from", dest="source", type=Path, default=Path("build/emoji/gpu"), help="output folder of gpu_train train"
    )
    one.add_argument(
        "--guides", type=Path, default=Path("build/emoji/guides"), help="output folder of gpu_train guides"
    )
    add_sampling_options(one, "number of images of trained captions for each row", 32)
    two.add_argument("--document", type=Path, default=DOCUMENT)
    for each in (one, two):
        each.add_argument("--json", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    try:
        if a.what == "measure":
            words = ["python", "-m", "benchmarks.emoji.step_lora", "measure", "--from", relative(a.source)]
            words += ["--guides", relative(a.guides), "--images", str(a.images)]
            words += ["--device", a.device] if a.device != "cpu" else []
            measure(a.source, a.guides, a.judge, a.cache, a.json, a.images, a.device, a.batch, shlex.join(words))
        elif a.json.is_file():
            write_text(page(read(a.json), a.json), a.document)
        else:
            raise InputError(f"{a.json} does not exist; run: python -m benchmarks.emoji.step_lora measure")
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
