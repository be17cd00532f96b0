"""``pnp-trt serve``: serve bundles through OpenAI's and A1111's interfaces, with a page."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .first_build import build_if_missing
from .requirements import require_packages

if TYPE_CHECKING:
    from ..serve.http.server import LoraOffer


def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="ENGINE...", help="Names or folders of bundles; default: emoji-tiny.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; an address that other machines can reach requires a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")] = 7860,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Maximum images per engine call.")] = 8,
    queue: Annotated[
        int, typer.Option(min=0, max=100_000, help="Maximum number of waiting images; further requests get a 429.")
    ] = 64,
    api: Annotated[str, typer.Option(help="Interfaces: openai, a1111, or both separated by a comma.")] = "openai,a1111",
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; default: the environment variable PNP_TRT_API_KEY.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Allow other machines without a key.")] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds after which a request is dropped.")] = 300.0,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per engine; default: all.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Use replicas of Ray Serve, one per GPU, which are replaced if they die.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Maximum replicas, only with --ray; default: one per GPU.")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Minimum replicas, only with --ray; default: --replicas.")
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of LoRAs (.safetensors) that requests may name.")
    ] = None,
    max_loras: Annotated[
        int, typer.Option(min=1, max=64, help="Maximum engines with LoRAs loaded at once, in addition to the others.")
    ] = 4,
    lora_cache: Annotated[
        Path | None, typer.Option(help="Folder for engines with LoRAs; default: loras in the user's cache folder.")
    ] = None,
    fetch_base: Annotated[
        bool, typer.Option("--fetch-base", help="Download an engine's base from the hub if LoRAs need it.")
    ] = False,
) -> None:
    """Serve images over HTTP: OpenAI's and A1111's interfaces, a page, health and metrics."""
    require_packages("serve --ray" if ray else "serve")
    if not ray and (replicas or min_replicas):
        raise InputError(f"{'--replicas' if replicas else '--min-replicas'} is given without --ray; add --ray")
    from ..serve.engine import EngineOptions
    from ..serve.http.server import LOCAL, Site, check
    from ..serve.http.server import serve as serve_here
    from ..serve.http.settings import APIS, Settings

    names = names or ["emoji-tiny"]
    apis = tuple(part.strip() for part in api.split(",") if part.strip())
    if not apis or any(part not in APIS for part in apis):
        raise InputError(f"--api is '{api}'; known: {', '.join(APIS)}")
    key = api_key or os.environ.get("PNP_TRT_API_KEY") or None
    settings = Settings(apis, key, deadline, host in LOCAL)
    if not no_key:
        check(settings, host)
    offer = None if loras is None else _offer(loras, max_loras, lora_cache, fetch_base)
    for name in names:
        build_if_missing(name, quiet=False)
    # warnings of every request would fill the terminal; the image's parameters record the same facts
    warnings.filterwarnings("ignore", category=UserWarning)
    site = Site(names, host, port, EngineOptions(slots, queue, provider, threads), settings, _ready)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn completes running requests before it raises the signal again
        if ray:
            from ..serve.ray.server import serve as serve_by_ray

            serve_by_ray(site, replicas, min_replicas, offer)
        else:
            serve_here(site, offer)


def _offer(folder: Path, most_loaded: int, cache: Path | None, fetch_base: bool) -> LoraOffer:
    require_packages("serve --loras")
    from ..build.swap.cache import PlugCache, default_home
    from ..serve.http.server import LoraOffer
    from ..serve.loras import read_loras

    plugged = PlugCache((cache or default_home()).absolute(), fetch_base)  # replicas may have another working directory
    return LoraOffer(read_loras(folder), plugged.take, plugged.check, most_loaded)


def _ready(address: str) -> None:
    print(f"serving at {address} (stop with Ctrl-C)", flush=True)
