"""``pnp-trt plug``: replace the weights of a built engine with a fine-tune's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plug(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="The bundle to start from, by name or folder.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The fine-tune: a diffusers folder, a U-Net's folder or .safetensors file, an original checkpoint, "
            "emoji-flat or emoji-3d; default with --lora: the engine's own base."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]", help="A LoRA to merge, such as sepia or mine.safetensors:0.8; repeatable."
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Autoencoder to replace the engine's with, such as one fixed for half precision: a diffusers folder "
            "or a .safetensors file. Without --base and --lora, only the autoencoder is replaced."
        ),
    ] = None,
    unet_only: Annotated[bool, typer.Option("--unet-only", help="Use only the fine-tune's U-Net.")] = False,
    prediction_type: Annotated[
        str | None,
        typer.Option(help="Prediction type of the fine-tune, epsilon or v_prediction; default: from its files."),
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None,
        typer.Option(
            "--zero-terminal-snr/--no-zero-terminal-snr",
            help="Whether the fine-tune's last training timestep is pure noise; default: from its files.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new bundle; default: engines/FINE_TUNE-GUIDE…")
    ] = None,
    memory_check: Annotated[bool, typer.Option(help="Refuse to compile if the host has too little memory.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Replace a built engine's weights with a fine-tune's and LoRAs, without exporting again; check against PyTorch."""
    from .. import backends
    from ..build.swap.run import PlugSpec
    from ..build.swap.run import plug as run
    from ..io.text import printable
    from ..models.noise import Noise
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("plug")
    spec = PlugSpec(
        engine, base, tuple(lora or ()), out, memory_check, unet_only, Noise(prediction_type, zero_terminal_snr), vae
    )
    with ProgressBar(f"plug into {engine}") as bar:
        plugged = run(spec, force=force, progress=bar.note)
    m = plugged.manifest
    status = "is up to date" if plugged.cached else f"plugged in {m.build_seconds:.1f} s"
    worst = max(m.parity.relative_error.values())
    folder = printable(plugged.folder)
    print(f"{folder} {status}: {m.precision}, parity with PyTorch {worst:.1e} (limit {m.parity.limit:.0e})")
    for network, how in (m.plugged.networks if m.plugged else {}).items():
        print(printable(f"{network}: {how}"))
    if isinstance(m.parity.engine, str) and m.profiles:
        print(printable(f"parity of the engines: {m.parity.engine}"))
    if reason := backends.get(m.backend).cannot_run(m.target, m.options):
        print(f"it cannot run here ({printable(reason)}); next: pnp-trt inspect {folder}")
    else:
        print(f"next: pnp-trt sample 'a red apple' --engine {folder}")
