"""Build the bundles that the package ships, and store them without weights: ``python -m benchmarks.emoji.packed``.

Run it whenever the bundled model, its guide or the export changes; ``tests/bundle/test_packed.py`` fails until then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pnp_trt.assets import ROOT
from pnp_trt.bench.engines import default_build, engine_names
from pnp_trt.build.swap.rewrite import places
from pnp_trt.bundle.manifest import WEIGHTS
from pnp_trt.bundle.packed import PACKED
from pnp_trt.bundle.store import read_manifest
from pnp_trt.io.files import make_folder, whole_folder

BASE = "emoji"
#: files of a bundle that are copies of the bundled model's files
COPIES = {"tokenizer.json": f"{BASE}/tokenizer/tokenizer.json"}
#: source of a weight → its checkpoint
CHECKPOINTS = {
    "unet": f"{BASE}/unet/diffusion_pytorch_model.safetensors",
    "text_encoder": f"{BASE}/text_encoder/model.safetensors",
    "vae": f"{BASE}/vae/diffusion_pytorch_model.safetensors",
    "guide": "guides/emoji-tiny/diffusion_pytorch_model.safetensors",
}


def pack(bundle: Path, folder: Path) -> None:
    """Store ``bundle`` in ``folder`` without its weights."""
    manifest = read_manifest(bundle)
    maps = json.loads((bundle / WEIGHTS).read_text(encoding="utf-8"))["networks"]
    data = {}
    for name, network in manifest.networks.items():
        weights = maps[name]["weights"]
        data[f"{network.graph}.data"] = [
            {"offset": place.offset, **weights[place.name]} for place in places(bundle / network.graph, weights)
        ]
    used = {weight["source"] for weights in data.values() for weight in weights}
    packed = {
        "checkpoints": {source: path for source, path in CHECKPOINTS.items() if source in used},
        "copies": COPIES,
        "data": data,
    }
    make_folder(folder.parent)
    with whole_folder(folder, removable=lambda _: None) as work:
        for relative in ["manifest.json", *manifest.files]:
            if relative not in data and relative not in COPIES:
                shutil.copyfile(bundle / relative, work / relative)
        (work / PACKED).write_text(json.dumps(packed, separators=(",", ":")) + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT.parents[1])}
        environment.pop("PNP_TRT_ENGINES", None)
        for name in engine_names(BASE):
            arguments = default_build(name)
            assert arguments is not None
            subprocess.run(
                [sys.executable, "-m", "pnp_trt", "build", *arguments], cwd=folder, env=environment, check=True
            )
            pack(Path(folder) / "engines" / name, ROOT / "bundles" / name)


if __name__ == "__main__":
    main()
