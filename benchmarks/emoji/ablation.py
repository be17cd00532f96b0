"""Compare guide designs, extra terms and kinds of states on an equal, short budget.

Every row is one ``distill`` run with the same number of steps, batch size and states; the row's name states what
differs.  Rows are judged on the same held-out trajectory states (those that a sampler visits) and on the similarity of
images to the teacher's guided ones.  ``python -m benchmarks.emoji.ablation`` resumes: finished rows are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pnp_trt.bench.measure import cost
from pnp_trt.bench.metrics import fidelity
from pnp_trt.bundle.store import digest, write_json, write_text
from pnp_trt.distill.guidance import GuidanceConfig, distill
from pnp_trt.distill.monitor import held_out_error, run_schedule
from pnp_trt.distill.run import TeacherModel
from pnp_trt.distill.states import Collection, StateConfig, States, split
from pnp_trt.distill.train import TrainConfig
from pnp_trt.models.guides import GuideInput
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.prompts import read_prompts
from pnp_trt.models.student import Student, cfg, encode
from pnp_trt.sampling.schedules import ddim

from .provenance import machine

PROMPTS = Path("calibration/emoji-prompts.txt")
STATES = 25_600
#: rows use fewer states than this; sets that only one or two rows use are limited to this size
FEWER_STATES = 4_800
IMAGES = 64
SAMPLING_STEPS = 20
W = 3.0


@dataclass(frozen=True)
class Row:
    """One run: its name, the group it is compared in, differences from the default, and length in budgets."""

    name: str
    group: str
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "trajectory"
    negative: float = 0.0
    longer: int = 1

    @property
    def cache(self) -> str:
        """Name of the states' folder."""
        words = [
            "states",
            *([self.kind] if self.kind != "trajectory" else []),
            *(["negative"] if self.negative else []),
        ]
        # all states, because other rows of the kind use fewer
        return "-".join(words) + ("-all" if self.longer > 1 and self.kind != "trajectory" else "")


#: base of every row: the first design that worked, before any comparison
BASELINE_OPTIONS = {"trunk_kind": "conv", "norm": False}
BASELINE_CONFIG = {"weighting": "w"}
ROWS = (
    Row("baseline", "design"),
    Row("depthwise trunk", "design", {"trunk_kind": "depthwise"}),
    Row("attention in the trunk", "design", {"trunk_kind": "attention"}),
    Row("attends to the text too", "design", {"text": True}),
    Row("looks at latent and text alone", "design", {"reads": "latent", "text": True}),
    Row("emits mid alone", "design", {"emits": "mid"}),
    Row("emits deep skips and mid", "design", {"emits": "deep"}),
    Row("normalised features", "design", {"norm": True}),
    Row("depthwise normalised", "design", {"trunk_kind": "depthwise", "norm": True}),
    Row("rank 16", "design", {"rank": 16, "embed_dim": 32, "trunk_blocks": 2}),
    Row("rank 96", "design", {"rank": 96}),
    Row("weighting none", "term", config={"weighting": "none"}),
    Row("weighting guidance", "term", config={"weighting": "guidance"}),
    Row("weighting x0", "term", config={"weighting": "x0"}),
    Row("w log-uniform", "term", config={"w_distribution": "log-uniform"}),
    Row("feature matching 0.1", "term", config={"feature_matching": 0.1}),
    Row("forward states", "states", kind="forward"),
    Row("trajectory states", "states"),
    # the comparison that decides the default, repeated with the settings of real training: x0 weighting, longer
    *(
        Row(f"{kind} states longer", "states-longer", config={"weighting": "x0"}, kind=kind, longer=4)
        for kind in ("forward", "trajectory")
    ),
    Row("negative prompts read", "negative", {"negative_prompts": True}, negative=0.5),
    Row("negative prompts ignored", "negative", {"negative_prompts": False}, negative=0.5),
)


def write_images(folder: Path, cache: Path) -> Path:
    """Write the training images with captions in the format of ``--images``, unless they exist."""
    from PIL import Image

    from .data import BASE_STYLES, caption, images, split

    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shots = images(BASE_STYLES, split()["train"], cache, 5)
    lines = []
    for i, (pixels, concept, style) in enumerate(zip(shots.pixels, shots.concepts, shots.styles, strict=True)):
        name = f"{i:05d}.png"
        # older data has pixels between 0 and 1, newer data has bytes
        whole = pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)
        Image.fromarray(whole).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(concept, style)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class Judge:
    """Held-out trajectory states and the teacher's images, which are the same for every row."""

    def __init__(self, states_dir: Path) -> None:
        self.teacher = TeacherModel.load("emoji", read_prompts(PROMPTS), torch.device("cpu"))
        config = StateConfig(count=STATES)
        identity = {"teacher": self.teacher.hashes, "prompts": digest(self.teacher.prompts)}
        collection = Collection(
            self.teacher.unet, self.teacher.scheduler, self.teacher.conditions, config, states_dir, identity
        )
        collection.make(range(config.shards))
        self.states: States = collection.read()
        self.held_out = split(config)[1]
        c = self.teacher.conditions
        rows = torch.arange(0, c.empty, c.empty // IMAGES)[:IMAGES]
        self.text = c.text(rows, torch.device("cpu"))
        self.empty = c.text(torch.full((len(rows),), c.empty), torch.device("cpu"))
        self.noise = torch.randn(len(rows), *self.teacher.sample_shape, generator=torch.Generator().manual_seed(77))
        self.w = torch.full((len(rows),), W)
        self.vae = self.teacher.base.vae()
        unet = self.teacher.unet
        self.images = self.sample(lambda x, t: cfg(unet, x, t, self.text, self.empty, self.w))
        self.plain = self.sample(lambda x, t: unet(x, t, self.text).sample)
        self.extract = fidelity.FeatureExtractor()
        self.features = self.extract(self.images)

    @torch.no_grad()
    def sample(self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> np.ndarray:
        x = run_schedule(predict, self.noise, ddim(self.teacher.scheduler, SAMPLING_STEPS))
        out = self.vae.decode(x / self.vae.config.scaling_factor).sample
        return out.div(2).add(0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()

    def distance(self, pixels: np.ndarray) -> dict[str, Any]:
        return {
            "psnr_db": fidelity.mean(fidelity.psnr(pixels, self.images)).as_dict(),
            "cosine": fidelity.mean(fidelity.cosine(self.extract(pixels), self.features)).as_dict(),
        }

    def cost_of(self, guide: Any) -> dict[str, Any]:
        unet = self.teacher.unet
        x, t = self.noise[:1], torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            _, features = encode(unet, x, t, self.text[:1])

        class Alone(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.guide = guide

            def forward(self, w: torch.Tensor, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
                from pnp_trt.models.guides import Features

                f = Features(tuple(s.to(x.device) for s in features.down_block_res_samples),
                             features.mid_block_res_sample.to(x.device))  # fmt: skip
                return self.guide(GuideInput(x, t, text, w, f, negative=text)).mid_block_res_sample

        alone = cost.count(Alone(), {"w": self.w[:1], "x": x, "t": t, "text": self.text[:1]})
        whole = cost.count(unet, {"sample": x, "timestep": t, "encoder_hidden_states": self.text[:1]})
        return {
            "parameters": alone.parameters, "parameters_share": alone.parameters / whole.parameters,
            "macs": alone.macs, "macs_share": alone.macs / whole.macs,
        }  # fmt: skip

    def judge(self, folder: Path, measured: dict[str, Any] | None) -> dict[str, Any]:
        """Cost, held-out error (``measured`` if the run's own report is on the same states) and distance."""
        guide = load_guide(str(folder))
        student = Student(self.teacher.unet, guide)
        # a guide that reads negative prompts gets the empty one
        error = measured or held_out_error(student, self.states, self.held_out)
        return {
            **self.cost_of(guide),
            "held_out": error,
            **self.distance(self.sample(lambda x, t: student(x, t, self.text, self.w, negative=self.empty))),
        }


TITLES = {
    "design": "Designs of the tiny guide",
    "term": "Extra terms, on the baseline design",
    "states": "Source of the states, equal numbers of states",
    "states-longer": "The same with x0 weighting, four times the steps and all states",
    "negative": "Negative prompts: half of the states have one",
}


def render(document: dict[str, Any]) -> str:
    """Render the record as a page of tables."""
    s, plain = document["settings"], document["no_guidance"]
    out = [
        "# Ablation\n",
        "Every row is one run of `pnp-trt distill guidance` on the bundled model with the same short budget: "
        f"{s['steps']} steps of {s['batch']} states. A row differs from *baseline* as its name states. *Residual*: the "
        "squared error to the teacher's guided prediction on held-out trajectory states, relative to that of "
        "no guide (1 = the guide does nothing); *bins* is the mean over (t, w) bins, *t ≥ 800* the noisiest of them. "
        "*PSNR* and "
        f"*cosine*: similarity to CFG's images from the same noise (w = {s['w']:g}, "
        f"{s['sampling_steps']} steps, {s['images']} images; no guidance: {plain['psnr_db']['value']:.2f} dB, "
        f"{plain['cosine']['value']:.3f}). "
        "Intervals are 95 % over images; one training seed, so differences of a tenth of a dB are not meaningful.\n",
    ]
    for group, title in TITLES.items():
        rows = [r for r in document["rows"] if r["group"] == group]
        if group == "term":
            rows = [r for r in document["rows"] if r["name"] == "baseline"] + rows
        if not rows:
            out.append(f"\n## {title}\n\nNot run.\n")
            continue
        own = group == "negative"
        out.append(f"\n## {title}\n")
        out.append(
            "| row | parameters | MACs | residual | bins | t ≥ 800 | PSNR, dB | cosine |" + (" own states |" * own)
        )
        out.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + (" ---: |" * own))
        for r in rows:
            noisy = [b["residual"] for b in r["held_out"]["bins"] if b["t_from"] == 800]
            psnr, cosine = r["psnr_db"], r["cosine"]
            out.append(
                f"| {r['name']} | {r['parameters']:,} ({r['parameters_share']:.1%}) | {r['macs_share']:.1%} | "
                f"{r['held_out']['residual']:.3f} | {r['held_out']['mean_of_bins']:.3f} | "
                f"{sum(noisy) / len(noisy):.3f} | {psnr['value']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}] | "
                f"{cosine['value']:.3f} [{cosine['low']:.3f}, {cosine['high']:.3f}] |"
                + (f" {r['own_held_out']:.3f} |" if own else "")
            )
        if group == "states-longer" and len(rows) == 2:
            forward, trajectory = sorted(rows, key=lambda r: r["differs"]["states"])
            better = max(rows, key=lambda r: r["psnr_db"]["value"])["differs"]["states"]
            near = [f"{r['psnr_db']['value']:.2f} dB" for r in (forward, trajectory)]
            off = [f"{r['held_out']['residual']:.3f}" for r in (forward, trajectory)]
            out.append(
                f"\nImages are closer to CFG's after training on *{better}* states: {near[0]} after forward and "
                f"{near[1]} after trajectory ones; the error on held-out trajectory states is {off[0]} and {off[1]}. "
                "`distill guidance` uses forward states, the paper's, if images are given, and otherwise trajectory "
                "states, which need only prompts. The bundled tiny guide was trained on both kinds, half of its states "
                "forward ones ([training](gpu.md#the-bundled-weights))."
            )
        if own:
            out.append("\n*Own states*: the residual on held-out states of which half have a negative prompt.")
    p = document["provenance"]
    out.append(
        f"\nMade by `{p['command']}` ({p['date'][:10]}); all numbers are in `benchmarks/results/emoji-ablation.json`."
    )
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji.ablation", description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, default=Path("build/emoji/ablation"))
    add("--cache", type=Path, default=Path("build/emoji"), help="images of the recipe")
    add("--states-dir", type=Path, default=None, help="trajectory states; default WORK/states")
    add("--steps", type=int, default=350)
    add("--batch", type=int, default=32)
    add("--rows", default="", help="only rows whose name contains one of these words, comma-separated")
    add("--train-only", action="store_true", help="train the rows without judging them")
    add("--json", type=Path, default=Path("benchmarks/results/emoji-ablation.json"))
    add("--document", type=Path, default=Path("docs/ablation.md"))
    args = parser.parse_args()
    states = args.states_dir or args.work / "states"
    selected = [r for r in ROWS if not args.rows or any(word in r.name for word in args.rows.split(","))]
    for row in selected:
        out = args.work / row.name.replace(" ", "-")
        if (out / "distill.json").exists():
            continue
        forward = row.kind == "forward"
        started = time.monotonic()
        distill(
            GuidanceConfig(
                "emoji", None if forward else PROMPTS, out,
                write_images(args.work / "images", args.cache) if forward else None,
                options=BASELINE_OPTIONS | row.options, grid_steps=0,
                states_dir=states if row.cache == "states" else args.work / row.cache,
                states=StateConfig(row.kind, FEWER_STATES if row.group in ("states", "negative") else STATES,
                                   negative=row.negative),
                train=TrainConfig(
                    args.steps * row.longer, args.batch, lr=3e-3, mixed_precision="auto",
                    checkpoint_every=args.steps, keep=1,
                ),
                **(BASELINE_CONFIG | row.config),
            ),
            resume=out.exists(),
        )  # fmt: skip
        print(row.name, f"{time.monotonic() - started:.0f} s", flush=True)
    if args.train_only:
        return
    judge = Judge(states)
    settings = {
        "steps": args.steps, "batch": args.batch, "states": STATES, "images": IMAGES,
        "fewer_states": FEWER_STATES, "sampling_steps": SAMPLING_STEPS, "w": W,
    }  # fmt: skip
    command = " ".join(["python", "-m", "benchmarks.emoji.ablation", *sys.argv[1:]])
    document: dict[str, Any] = {
        "schema": "pnp-trt/emoji-ablation/2", "provenance": machine(command), "settings": settings,
        "no_guidance": judge.distance(judge.plain), "rows": [],
    }  # fmt: skip
    for row in ROWS:
        out = args.work / row.name.replace(" ", "-")
        if not (out / "distill.json").exists():
            continue
        report = json.loads((out / "distill.json").read_text())
        differs = {**row.options, **row.config, "states": row.kind, "negative": row.negative}
        differs |= {"steps": args.steps * row.longer} if row.longer > 1 else {}
        document["rows"].append({
            "name": row.name, "group": row.group, "differs": differs, "own_held_out": report["held_out"]["residual"],
            "train_seconds": report["seconds"], "final_loss": report["final_loss"],
            **judge.judge(out, report["held_out"] if row.group in ("design", "term") else None),
        })  # fmt: skip
        last = document["rows"][-1]
        numbers = f"residual {last['held_out']['residual']:.3f}, psnr {last['psnr_db']['value']:.2f} dB"
        print(f"{row.name:32s} {last['parameters']:8,d} {numbers}", flush=True)
        write_json(args.json, document)
    write_text(render(document), args.document)


if __name__ == "__main__":
    main()
