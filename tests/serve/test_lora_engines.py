"""Which LoRAs a server offers and which engines it keeps loaded; fakes replace plugging and networks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pnp_trt.errors import InputError, PnpError
from pnp_trt.serve.engine import Busy, Stopping
from pnp_trt.serve.loras import LoraEngines, read_loras


# -- the folder --------------------------------------------------------------------------------------------------------
def test_names_are_file_names_and_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "more").mkdir(parents=True)
    for name in ("sepia", "Ölbild v1.5", ".hidden", "more/b"):
        (folder / f"{name}.safetensors").write_text(name)
    (folder / "notes.txt").touch()
    (folder / "alias.safetensors").symlink_to(folder / "more" / "b.safetensors")
    loras = read_loras(folder)
    assert list(loras) == ["alias", "sepia", "Ölbild v1.5"]
    assert loras["alias"].path == (folder / "more" / "b.safetensors").resolve()


def climbing(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_text("x")
    (folder / "a.safetensors").symlink_to("../secret.safetensors")


def circle(folder: Path) -> None:
    (folder / "a.safetensors").symlink_to(folder / "a.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (climbing, "“a.safetensors” is a link out of its folder; copy the file"),
        (circle, "the LoRA “a.safetensors” cannot be read"),
        (
            lambda folder: (folder / "a.safetensors").symlink_to("nothing"),
            "“a.safetensors” cannot be read (No such",
        ),
        (lambda folder: (folder / "a.safetensors").mkdir(), "is not a file"),
        (lambda folder: None, "has no .safetensors file"),
        (lambda folder: folder.rmdir(), "cannot be read"),
        *(
            (lambda folder, name=name: (folder / f"{name}.safetensors").touch(), "a name that a prompt cannot state")
            for name in ("a\nb", "a\x1b[31m", "a\u202eb", "a:0.5", "<a>", " a", "a.safetensors")
        ),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError) as refused:
        read_loras(folder)
    assert message in str(refused.value) and str(refused.value).isprintable()


# -- engines -----------------------------------------------------------------------------------------------------------
@dataclass
class Fake:
    """A fake for both an engine and a plugged bundle."""

    name: str
    stopped: bool = False
    closed: bool = False
    pipeline: Any = None
    bundle: Any = None

    def stop(self, drain: bool = True) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakeManifest:
    name: str


@dataclass(frozen=True)
class FakeBundle:
    manifest: FakeManifest
    folder: Path = Path("/somewhere/secret")


@dataclass
class Held:
    """Engines with LoRAs from a folder with a, b and c; plugging waits for ``gate``."""

    engines: LoraEngines
    base: Any
    plugs: list[str] = field(default_factory=list)
    plugged: list[Fake] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def plug(self, bundle: Any, loras: Any) -> Fake:
        name = "+".join(f"{path.stem}:{scale:g}" for path, scale in loras)
        self.plugs.append(name)
        assert self.gate.wait(120)
        if name.startswith("c"):
            raise InputError(f"the LoRA {loras[0][0]} is for another unet of {bundle.folder}")
        if name.startswith("b:9"):
            raise RuntimeError("broken")
        self.plugged.append(Fake(name, bundle=FakeBundle(FakeManifest("key"))))
        return self.plugged[-1]

    def acquire(self, *loras: tuple[str, float]) -> Any:
        return self.engines.acquire(self.base, self.engines.check(loras))

    def open(self, *loras: tuple[str, float]) -> Any:
        """Load an engine, release it and return it."""
        lease = self.acquire(*loras)
        try:
            return lease.future.result(120)
        finally:
            lease.release()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    for name in "abc":
        (tmp_path / f"{name}.safetensors").write_text(name)
    base: Any = SimpleNamespace(pipeline=SimpleNamespace(name="base", bundle=FakeBundle(FakeManifest("base"))))
    harness = Held(None, base)  # type: ignore[arg-type]
    start: Any = lambda bundle: Fake(bundle.manifest.name)  # noqa: E731
    harness.engines = LoraEngines(read_loras(tmp_path), harness.plug, start, most=2, waiting=3)  # type: ignore[arg-type]
    harness.gate.set()
    yield harness
    harness.gate.set()
    harness.engines.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_requests_share_an_engine_and_the_least_recently_used_is_unloaded(held: Held) -> None:
    first = held.open(("a", 0.5))
    assert held.open(("a", 0.5)) is first and first.name == "base"
    second = held.open(("b", 0.5))
    held.open(("a", 0.5))
    held.open(("a", 0.7), ("b", -0.0))
    assert held.plugs == ["a:0.5", "b:0.5", "a:0.7+b:0"]
    assert second.stopped and held.plugged[1].closed and not first.stopped
    assert len(held.engines.engines()) == 2


def test_an_engine_is_unloaded_only_after_its_requests(held: Held) -> None:
    leases = [held.acquire(("a", scale)) for scale in (1, 2, 3)]
    first, second = (lease.future.result(120) for lease in leases[:2])
    until(lambda: len(held.plugs) == 3)
    again = held.acquire(("a", 1))  # waits behind the third, which replaces the first
    time.sleep(0.05)
    assert not first.stopped and not leases[2].future.done()
    leases[0].release()
    assert leases[2].future.result(120) and first.stopped and not second.stopped
    leases[1].release()
    leases[2].release()
    assert again.future.result(120) is not first and held.plugs[3] == "a:1"
    again.release()


def test_errors_of_a_lora_contain_no_paths_and_do_not_affect_others(
    held: Held, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as failed:
        held.open(("c", 1))
    assert str(failed.value) == "engine 'base' cannot use the LoRA “c”: the LoRA 'c' is for another unet of 'base'"
    with pytest.raises(PnpError, match="unexpected RuntimeError; the server's output has the details"):
        held.open(("b", 9))
    assert "RuntimeError: broken" in capfd.readouterr().err
    assert held.open(("a", 1)) and [name for name, _ in held.engines.engines()] == ["base"]
    with pytest.raises(InputError):
        held.open(("c", 1))
    held.engines.files["b"].path.write_text("another")
    with pytest.raises(InputError, match="“b” was changed after the server started"):
        held.open(("b", 1))


def test_waiting_requests_are_bounded_and_released_ones_are_not_served(held: Held) -> None:
    held.gate.clear()
    leases = [held.acquire(("a", scale)) for scale in (1, 2, 2)]
    for loras in (("a", 2), ("a", 3)):
        with pytest.raises(Busy, match="too many requests wait"):
            held.acquire(loras)
    for lease in leases[1:]:
        lease.release()
    held.gate.set()
    with pytest.raises(PnpError, match="no request waits for the LoRA any more"):
        leases[1].future.result(120)
    assert leases[0].future.result(120) and held.plugs == ["a:1"]
    leases[0].release()


def test_stop_unloads_every_engine_and_refuses_requests(held: Held) -> None:
    loaded = held.open(("a", 1))
    held.gate.clear()
    late: list[Future[Any]] = [held.acquire(("b", scale)).future for scale in (1, 2)]
    until(lambda: len(held.plugs) == 2)
    ending = threading.Thread(target=held.engines.stop)
    ending.start()
    until(lambda: held.engines._stopping)
    held.gate.set()
    ending.join(120)
    assert not ending.is_alive() and loaded.stopped and all(each.closed for each in held.plugged)
    for each in late:
        with pytest.raises(Stopping):
            each.result(0)
    with pytest.raises(Stopping):
        held.acquire(("a", 1))


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        *(
            (((name, 1.0),), "no LoRA has the name “")
            for name in (
                "",
                "../a",
                "/etc/passwd",
                "a.safetensors",
                "a\0",
                "a\nb",
                "A",
                "ä" * 10**6,
                "~/a",
                "./a",
                "C:\\a",
            )
        ),
        *(
            ((("a", scale),), "it must be between -100 and 100")
            for scale in (math.nan, math.inf, -math.inf, 1e9, -100.5, 1e308)
        ),
        ((("a", 1.0), ("b", 1.0), ("a", 0.5)), "“a” is named twice"),
        ((("a", 1.0),) * 5, "5 LoRAs were named; at most 4"),
    ],
)
def test_invalid_names_scales_and_numbers_of_loras_are_refused(held: Held, loras: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        held.acquire(*loras)
    text = str(refused.value)
    assert message in text and text.isprintable() and len(text) < 250 and not held.plugs
