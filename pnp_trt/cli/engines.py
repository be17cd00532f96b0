"""The commands that build and examine engines: build, inspect, list, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, PnpError
from ..io.text import printable, printable_json

#: in GiB, more than any GPU has
_MOST_WORKSPACE = 65_536


def build(
    base: Annotated[
        str,
        typer.Option(
            help="Base model: emoji, a bundled fine-tune, a diffusers folder, a .safetensors checkpoint, a hub id, or "
            "random:sd15."
        ),
    ] = "emoji",
    guide: Annotated[
        str, typer.Option(help="A bundled guide, a guide's folder, or 'none' for the teacher without a guide.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Backend that runs the networks: {backends}.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="{recipes}.")] = "fp32",
    target: Annotated[
        str | None,
        typer.Option(
            help="GPU to compile for: sm_75, sm_80, sm_86, sm_89, sm_120 or portable with tensorrt-rtx; with torch, "
            "eager or compile."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Record of pnp-trt calibrate, for int8; default: the record for this base and guide."),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Batch sizes and image sizes in pixels: b1, b2-8, b1@512x768, b1-4@256-768; repeatable."),
    ] = None,
    workspace: Annotated[
        float | None, typer.Option(min=0, help="Limit for the compiler's GPU workspace, in GiB.")
    ] = None,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Allow the engine's weights to be replaced later.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later TensorRT versions load the engine (tensorrt).")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Let other GPUs, Ampere or later, run the engine (tensorrt).")
    ] = False,
    image_to_image: Annotated[
        bool, typer.Option("--image-to-image", help="Include the VAE encoder, for pnp-trt sample --init.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum tokens of a prompt, in chunks of 77: 154 for two, 231 for three; default: one chunk."
        ),
    ] = None,
    unet_only: Annotated[
        bool, typer.Option("--unet-only", help="Use only the U-Net of a base that is a single .safetensors file.")
    ] = False,
    prediction_type: Annotated[
        str | None,
        typer.Option(help="Prediction type of the base, epsilon or v_prediction; default: from its files."),
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None,
        typer.Option(
            "--zero-terminal-snr/--no-zero-terminal-snr",
            help="Whether the base's last training timestep is pure noise; default: from its files.",
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="Folder or .safetensors file of an autoencoder to use instead of the base's own."),
    ] = None,
    memory_check: Annotated[bool, typer.Option(help="Refuse to start if the host has too little memory.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle; default: engines/BASE-GUIDE…")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Build a bundle: fuse guide and U-Net into one graph, export all networks, check them against PyTorch, compile."""
    from .. import backends
    from ..build.builder import build as run
    from ..build.spec import BuildSpec
    from ..bundle.compile_options import CompileOptions
    from ..models.noise import Noise
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("build")
    if workspace is not None and not workspace <= _MOST_WORKSPACE:  # infinity and NaN too
        raise InputError(f"--workspace is {workspace:g}; it must be between 0 and {_MOST_WORKSPACE:,} GiB")
    options = CompileOptions(
        workspace=None if workspace is None else int(workspace * 2**30),
        refittable=refittable,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        check_memory=memory_check,
    )
    spec = BuildSpec(
        base, guide, backend, precision, out, target, tuple(profile or ()), options, calibration, image_to_image,
        unet_only, Noise(prediction_type, zero_terminal_snr), vae, tokens,
    )  # fmt: skip
    with ProgressBar(f"build {spec.folder().name}") as bar:
        built = run(spec, force=force, progress=bar.note)
    m = built.manifest
    size = sum(f.size for f in m.files.values()) / 2**20
    status = "is up to date" if built.cached else f"built in {m.build_seconds:.0f} s"
    worst = max(m.parity.relative_error.values())
    where = f", {m.backend} for {printable(m.target)}" if m.target != "any" else ""
    folder = printable(built.folder)
    print(
        f"{folder} {status}: {size:.0f} MiB, {m.precision}{where}, "
        f"parity with PyTorch {worst:.1e} (limit {m.parity.limit:.0e})"
    )
    for name, network in m.networks.items():
        if network.fallback is not None:
            print(printable(f"{name} stays in {network.precision}: {network.fallback}"))
    if remark := backends.get(m.backend).remark(m.precision):
        print(remark)
    if isinstance(m.parity.engine, str) and m.compiler:
        print(printable(f"parity of the engines: {m.parity.engine}"))
    if reason := backends.get(m.backend).cannot_run(m.target, m.options):
        print(f"it cannot run here ({printable(reason)}); next: pnp-trt inspect {folder}")
    else:
        print(f"next: pnp-trt sample 'a red apple' --engine {folder}")


def inspect(
    engine: Annotated[str, typer.Argument(help="A bundle's name or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show a bundle's contents, target, profiles and parity, and whether it can run here."""
    from .. import backends
    from ..bundle.store import find_bundle, read_manifest
    from .console import stdout_console
    from .tables import render

    folder = find_bundle(engine)
    manifest = read_manifest(folder)
    if as_json:
        print(printable_json(json.dumps(manifest.to_json(), indent=2)))
        return
    problem = None
    try:
        backends.of(manifest).check(manifest)
    except InputError as e:
        problem = str(e)
    stdout_console().print(render(folder, manifest, problem))


def list_engines(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the bundles in the engines folder with their sizes."""
    from ..bundle.store import engines_home
    from .console import stdout_console
    from .tables import rows, table

    bundles = rows(engines_home())
    if as_json:
        print(printable_json(json.dumps(bundles, indent=2)))
    elif bundles:
        stdout_console().print(table(bundles))
    else:
        print(f"no engine in {printable(engines_home())} yet; make one with: pnp-trt build")


def verify(
    engine: Annotated[str, typer.Argument(help="A bundle's name or folder.")],
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda, for onnxruntime and torch.")] = "auto",
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Compare every tensor of the graphs; show the largest errors and the first tensor that is not finite.",
        ),
    ] = False,
    network: Annotated[
        list[str] | None, typer.Option(help="With --layers, a network to compare; repeatable; default: all.")
    ] = None,
    worst: Annotated[int, typer.Option(min=1, help="With --layers, the number of tensors to show per network.")] = 8,
) -> None:
    """Run a bundle's engines on its golden inputs and compare the outputs with PyTorch's."""
    from ..backends.base import LoadOptions
    from ..bundle.store import open_bundle
    from ..runtime import verify as module
    from .requirements import require_packages

    if layers:
        require_packages("verify --layers")
    bundle = open_bundle(engine)
    if layers:
        _verify_layers(bundle, network or [], worst)
        return
    errors: dict[str, Any] = module.verify(bundle, LoadOptions(provider))
    networks = bundle.manifest.networks
    for name, error in errors.items():
        entry = networks[name.partition("@")[0]]
        limit, kind = entry.parity.limit, entry.precision
        print(f"{printable(name)}: relative error {error:.1e} (limit {limit:.0e}, {kind})")
    try:
        module.gate(errors, networks, bundle.name)
    except PnpError as e:
        if any(n.graph.endswith(".onnx") for n in networks.values()):
            raise PnpError(f"{e}; compare layers with: pnp-trt verify {engine} --layers") from e
        raise


def _verify_layers(bundle: Any, networks: list[str], worst: int) -> None:
    """Compare every tensor of the bundle's graphs with its value in float32; the engines are not run."""
    from ..build import layers as module
    from .console import stdout_console
    from .progress import ProgressBar
    from .tables import layer_table

    graphs = module.graphs(bundle, networks)
    problems = []
    for name, (path, inputs) in graphs.items():
        with ProgressBar(f"{name}: layers") as bar:
            tensors = module.layerwise(path, inputs, progress=bar.count)
        limit = bundle.manifest.networks[name].parity.limit
        verdict, problem = module.verdict(tensors, limit)
        print(printable(f"{name}: {verdict}"))
        problems += [f"the {name}: {verdict}"] if problem else []
        stdout_console().print(layer_table(module.worst(tensors, worst)))
    if problems:
        raise PnpError(f"engine '{bundle.name}': {'; '.join(problems)}")
