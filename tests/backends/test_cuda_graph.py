"""The sampling loop on a fake GPU in host memory: equal images, captured graphs, copies over the bus, failures."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnp_trt.backends import cuda_graph
from pnp_trt.bundle.manifest import Tensor
from pnp_trt.errors import Cancelled, InputError, PnpError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling import device_loop
from pnp_trt.sampling.device_loop import Feeds, LoopPlan
from pnp_trt.sampling.table import make_table

from .. import fake_gpu
from ..conftest import once
from ..fake_gpu import SOURCE, Gpu
from ..runtime.test_prompt_chunks import LONG, make_guided


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


class Both:
    """A pipeline that samples on the host, and one that runs the same networks as engines on the fake GPU."""

    def __init__(self, gpu: Gpu, folder: Path) -> None:
        self.host = Pipeline.load(folder, provider="cpu", threads=1)
        self.device = Pipeline.load(folder, provider="cpu", threads=1)
        entries = self.device.bundle.manifest.networks
        self.unet = fake_gpu.network(gpu, "unet", entries["unet"], self.device._unet)
        self.vae = fake_gpu.network(gpu, "vae", entries["vae_decoder"], self.device._vae)
        self.loops = cuda_graph.device_loops(gpu, self.unet, self.vae, None, self.device.name)
        self.device.loops = self.loops


@pytest.fixture
def guided(gpu: Gpu, micro_bundles: Path) -> Both:
    return Both(gpu, micro_bundles / "guided")


def equal(both: Both, prompts: Any = "a cat", **options: Any) -> None:
    options = {"steps": 3} | options
    for one, other in zip(both.host(prompts, **options), both.device(prompts, **options), strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.parameters == other.parameters


SCHEDULES = ["ddim", "dpm++", "euler", "heun", "unipc"]
METHODS = [("guided", None), ("plain", "cfg"), ("plain", "unguided")]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_eager_images_equal_the_hosts(
    gpu: Gpu, micro_bundles: Path, schedule: str, name: str, method: str | None
) -> None:
    both = Both(gpu, micro_bundles / name)
    both.loops.capture = False
    gpu.backwards = schedule != "ddim"  # the results must not depend on the order of a kernel's threads
    equal(both, ["a cat", "a red house"], seed=[4, 5], guidance=[2.0, 3.0], schedule=schedule, method=method)


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_one_capture_serves_every_schedule_and_number_of_steps(
    gpu: Gpu, micro_bundles: Path, name: str, method: str | None
) -> None:
    both = Both(gpu, micro_bundles / name)
    runs = [(schedule, steps) for steps in (2, 4, 1) for schedule in SCHEDULES]
    for number, (schedule, steps) in enumerate(runs):
        equal(both, ["a cat", "a red house"], seed=[number, 5], guidance=[2.0, 1.0 + number / 2], schedule=schedule,
              steps=steps, method=method)  # fmt: skip
    assert (both.loops.captures, both.loops.replays, both.loops.why_not) == (1, len(runs) - 1, None)
    assert len(gpu.runtime.graphs) == 3


def test_an_initial_image_needs_no_new_capture(guided: Both) -> None:
    image = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    for schedule, strength in (("dpm++", 0.5), ("unipc", 0.75), ("dpm++", 0.75)):
        table = guided.host.schedule(4, schedule).start(strength)
        a, b = (
            p.denoise(p.encode(["x"]), p.noise([3]), steps=4, guidance=3.0, schedule=table, image=image)
            for p in (guided.host, guided.device)
        )
        np.testing.assert_array_equal(a, b)
    assert (guided.loops.captures, guided.loops.replays) == (1, 2)


def test_a_run_is_independent_of_the_previous_run(guided: Both) -> None:
    """The first rows have no previous step, so nonzero scales for it must not read what the buffers contain."""
    ones = np.ones(4, np.float32)
    table = make_table(
        "test", np.array([900, 600, 300, 1]), x_scale=0.9 * ones, output_scale=-0.1 * ones, previous_scale=0.5 * ones,
        older_scale=0.25 * ones, data_x=ones, data_output=-ones, image_scale=ones, noise_scale=ones,
    )  # fmt: skip
    for seed in (1, 2, 3):
        a, b = (
            p.denoise(p.encode(["x"]), p.noise([seed]), steps=4, guidance=3.0, schedule=table)
            for p in (guided.host, guided.device)
        )
        np.testing.assert_array_equal(a, b)
    assert guided.loops.replays == 2


def test_a_replay_copies_in_latents_text_and_w_and_copies_out_pixels_only(gpu: Gpu, guided: Both) -> None:
    for _ in range(2):
        guided.device("a cat", steps=5)
    before = dict(gpu.runtime.memory)
    log = gpu.runtime.log
    del log[:]
    guided.device("another", steps=5, seed=8, guidance=6.0)
    # text, guidance for the network, latents, w, coefficients, timesteps; begin, five steps, end; then one wait.  The
    # copies to the host are part of the last graph
    assert [n for n in log if n != "wait"] == ["HostToDevice"] * 6 + ["replay"] * 7
    assert log[log.index("replay") :] == ["replay"] * 7 + ["wait"]
    assert gpu.runtime.memory.keys() == before.keys()
    begin, step, end = gpu.runtime.graphs.values()
    del log[:]
    guided.loops.capture = False
    guided.device("another", steps=5, seed=8, guidance=6.0)
    work = Counter(log[6 + log.count("wait") - 1 : -1])
    assert work["unet"] == work["show"] == work["update"] == 5 and work["vae"] == work["to_bytes"] == 1
    assert work["DeviceToHost"] == 2 and work["wait"] == 0
    assert len(step) == 3 and len(begin) + 5 * len(step) + len(end) == sum(work.values())


def test_graphs_are_kept_for_the_last_batch_sizes(gpu: Gpu, guided: Both) -> None:
    for count in (2, 3, 2, 3):  # two batch sizes are kept
        guided.device(["a cat"] * count, steps=2, seed=list(range(count)))
    assert (guided.loops.captures, guided.loops.replays) == (2, 2) and len(gpu.runtime.graphs) == 6
    for _ in range(2):
        guided.device("a cat", steps=2)
    assert (guided.loops.captures, guided.loops.replays) == (3, 3) and len(gpu.runtime.graphs) == 6
    guided.device(["a cat"] * 3, steps=2)  # kept, because it was used after batches of two
    assert (guided.loops.captures, guided.loops.replays) == (3, 4)
    guided.loops.clear()
    assert not gpu.runtime.graphs


def test_a_table_too_long_for_the_buffers_gets_larger_ones(
    gpu: Gpu, guided: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_loop, "ROWS", 4)
    for steps in (4, 5, 9, 8, 7, 4):  # 4 rows eagerly; 8; 12, which evicts 4; 8 twice; 4 again eagerly
        equal(guided, steps=steps, seed=steps)
    assert (guided.loops.captures, guided.loops.replays) == (1, 2)
    assert LoopPlan(1, (8, 8), guided.host.schedule(1000), False, True).shape.rows == 1000
    monkeypatch.undo()
    assert [LoopPlan(1, (8, 8), guided.host.schedule(n, "heun"), False, True).shape.rows for n in (500, 501)] == [
        1000,
        2000,
    ]


def test_latents_and_pixels_share_the_captured_steps(gpu: Gpu, guided: Both) -> None:
    def latents(seed: int) -> None:
        a, b = (
            p.denoise(p.encode(["x"]), p.noise([seed]), steps=3, guidance=3.0) for p in (guided.host, guided.device)
        )
        np.testing.assert_array_equal(a, b)

    for seed in range(3):
        latents(seed)
    assert len(gpu.runtime.graphs) == 3
    equal(guided, seed=3)  # the decoder's first run, which is not captured
    assert len(gpu.runtime.graphs) == 3
    equal(guided, seed=4)
    latents(5)
    assert len(gpu.runtime.graphs) == 4
    assert (guided.loops.captures, guided.loops.replays) == (1, 5)


def test_memory_does_not_grow_and_is_freed(gpu: Gpu, guided: Both) -> None:
    guided.device("a cat", steps=2)
    allocations = len(gpu.runtime.memory)
    for seed in range(6):
        guided.device("a cat", steps=2, seed=seed)
    assert len(gpu.runtime.memory) == allocations
    log = gpu.runtime.log
    del log[:]
    guided.loops.clear()
    assert log.index("drop") < log.index("free")  # graphs contain the buffers' addresses
    bound = [b for n in (guided.unet, guided.vae) for b in n._idle]
    assert len(gpu.runtime.memory) == sum(2 * len(b.addresses) for b in bound)
    for b in bound:
        b.close()
    assert not gpu.runtime.memory
    equal(Both(gpu, guided.host.bundle.folder))


def test_buffers_live_as_long_as_their_graph(gpu: Gpu, guided: Both) -> None:
    for _ in range(2):
        guided.device("a cat", steps=2)
    gc.collect()
    equal(guided, steps=2, seed=3)
    assert guided.loops.replays == 2


def test_runs_after_clear_are_captured_again(guided: Both) -> None:
    for _ in range(2):
        guided.device("a cat", steps=2)
    guided.loops.clear()
    equal(guided, steps=2)
    equal(guided, steps=2)
    assert guided.loops.captures == 2


def refuse(gpu: Gpu, both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    both.unet.engine.fails = lambda stream: stream in gpu.runtime.capturing


def allocate(gpu: Gpu, both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    both.vae.engine.capturable = False


def late(gpu: Gpu, both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the capture of the end fail, after begin and step were captured."""
    both.vae.engine.fails = lambda stream: stream in gpu.runtime.capturing


def no_memory(gpu: Gpu, both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    error = fake_gpu.real.cudaError_t.cudaErrorMemoryAllocation
    monkeypatch.setattr(gpu.runtime, "cudaGraphInstantiate", lambda *_: (error, None))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (refuse, "TensorRT could not run"),
        (late, "TensorRT could not run"),
        (allocate, "vae.engine cannot be captured; build it again"),
        (no_memory, "cudaGraphInstantiate failed: cudaErrorMemoryAllocation"),
    ],
)
def test_a_failed_capture_warns_with_its_reason_and_images_are_equal(
    gpu: Gpu, guided: Both, harm: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm(gpu, guided, monkeypatch)
    equal(guided)
    with pytest.warns(UserWarning, match=rf"'guided': the sampling loop could not be captured .*{reason}") as caught:
        equal(guided, seed=1)
    assert len(caught) == 1 and not gpu.runtime.capturing and not gpu.runtime.graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal(guided, seed=2)  # the capture is not tried again
    assert guided.loops.captures == guided.loops.replays == 0


def test_a_callback_is_called_after_every_captured_step_and_may_cancel(gpu: Gpu, guided: Both) -> None:
    seen: list[int] = []
    for seed in range(2):
        equal(guided, steps=4, seed=seed, callback=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4] * 4
    log = gpu.runtime.log
    del log[:]
    guided.device("a cat", steps=4, callback=lambda *_: log.append("callback"))
    # each step is reported only after it has completed
    reported = ["replay", "wait", "callback"]
    assert log[log.index("replay") :] == ["replay", *reported * 4, "replay", "wait"]
    with pytest.raises(Cancelled, match="after 2 of 4"):
        guided.device("a cat", steps=4, callback=lambda done, _: done < 2)
    equal(guided, steps=4, seed=6)
    assert (guided.loops.captures, guided.loops.replays) == (1, 3)


def test_values_that_are_not_finite_raise_an_error(gpu: Gpu, guided: Both) -> None:
    for values, network in (("latents", guided.unet), ("decoded pixels", guided.vae)):
        original = network.engine.function

        def broken(original: Any = original, **inputs: np.ndarray) -> np.ndarray:
            out = original(**inputs).copy()
            out[1].flat[7] = np.nan
            return out

        network.engine.function = broken
        with pytest.raises(PnpError, match=rf"the {values} of image 1 are not finite"):
            guided.device(["a cat", "a dog"], steps=2, seed=[1, 2])
        network.engine.function = original
    equal(guided, ["a cat", "a dog"], steps=2, seed=[1, 2])


def test_new_buffers_are_allocated_after_a_failure(gpu: Gpu, guided: Both) -> None:
    guided.device("a cat", steps=2)
    guided.unet.engine.fails = lambda stream: True
    guided.loops.capture = False
    with pytest.raises(PnpError, match="TensorRT could not run"):
        guided.device("a cat", steps=2)
    guided.unet.engine.fails = lambda stream: False
    equal(guided, steps=2)


def test_prompts_of_one_chunk_and_of_two_are_captured_separately(
    gpu: Gpu, micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = once(tmp_path_factory, "chunks/guided", partial(make_guided, micro_base, micro_guide))
    both = Both(gpu, folder)
    for seed in (1, 2, 3):  # one call for the prompts of one chunk, one for those of two
        equal(both, ["a cat", LONG, "a panda", LONG], seed=[seed + i for i in range(4)], prompt_syntax="a1111")
    assert (both.loops.captures, both.loops.replays, both.loops.why_not) == (2, 4, None)
    index = [both.unet.profile_for(1, (8, 8), tokens) for tokens in (77, 154)]
    assert [both.unet.profiles[i].name for i in index] == ["b1-8 of 77 tokens", "b1-8 of 154 tokens"]
    with pytest.raises(InputError, match=r"have 231 tokens; .* for up to 154; build with --tokens 231"):
        both.unet.profile_for(1, (8, 8), 231)
    with pytest.raises(InputError, match="open tokens; bind it with"), both.unet.bind(1, (8, 8)):
        pass


def test_the_condition_network_is_part_of_the_graph(gpu: Gpu, guided: Both) -> None:
    latent: Tensor = "float32", ("batch", 4, 8, 8)
    record = guided.device.bundle.manifest.networks["unet"]
    condition_record = replace(record, inputs={"guidance": ("float32", ("batch",))}, outputs={"condition": latent})
    unet_record = replace(
        record,
        inputs={"sample": latent, "timestep": ("int64", ("batch",)), "condition": latent},
        outputs={"out": latent},
    )
    condition_network = fake_gpu.network(
        gpu,
        "condition",
        condition_record,
        lambda guidance: np.ones((len(guidance), 4, 8, 8), np.float32) * guidance[:, None, None, None],
    )
    unet = fake_gpu.network(gpu, "unet", unet_record, lambda sample, timestep, condition: 0.1 * sample + condition)
    loops = cuda_graph.device_loops(gpu, unet, guided.vae, condition_network, "x")
    table = guided.host.schedule(4, "dpm++")
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    for w in ([1.0, 2.0], [3.0, 5.0], [2.0, 7.0]):
        scale = np.array(w, np.float32)
        result = loops.run(LoopPlan(2, (8, 8), table, False, False), Feeds(start, scale, {}))
        x, previous = start, None
        for i in range(4):
            output = 0.1 * table.scaled(i, x) + scale[:, None, None, None]
            x, previous = table.step(i, x, output, previous)
        np.testing.assert_array_equal(result.values, x)
    assert loops.captures == 1 and loops.replays == 2


def test_the_compiled_kernels_match_their_source() -> None:
    """``kernels.ptx`` is what runs; after a change of ``kernels.cu``, compile it with benchmarks/kernels.py."""
    assert hashlib.sha256(SOURCE.read_bytes()).hexdigest() in cuda_graph.ptx().splitlines()[0].decode()
    assert b".target sm_75" in cuda_graph.ptx() and b"fma.rn" not in cuda_graph.ptx()
