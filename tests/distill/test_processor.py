"""Which data types the processor multiplies natively, the resulting mixed precision, and float32 products elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnp_trt import processor
from pnp_trt.build import modules
from pnp_trt.distill.train import TrainConfig, make_accelerator

EPYC_1 = "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma f16c\nbugs\t\t: sysret_ss_attrs\n"
SAPPHIRE_RAPIDS = "flags\t\t: avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile\n"
COOPER_LAKE = "flags\t\t: avx512f avx512_bf16\n"
GRAVITON_2 = "processor\t: 0\nFeatures\t: fp asimd aes fphp asimdhp\n"
GRAVITON_3 = "Features\t: fp asimd fphp asimdhp svebf16 bf16\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file that replaces the system's description of its processor."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_CPUINFO", path)
    processor.multiplies.cache_clear()
    yield path
    processor.multiplies.cache_clear()


@pytest.mark.parametrize(
    ("text", "bfloat16", "float16"),
    [(EPYC_1, False, False), (SAPPHIRE_RAPIDS, True, True), (COOPER_LAKE, True, False), (GRAVITON_2, False, True),
     (GRAVITON_3, True, True), ("", False, False)],
)  # fmt: skip
def test_native_types_are_read_from_cpuinfo(cpuinfo: Path, text: str, bfloat16: bool, float16: bool) -> None:
    cpuinfo.write_text(text)
    assert (processor.multiplies("bfloat16"), processor.multiplies("float16")) == (bfloat16, float16)


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this PyTorch does not list capabilities")
@pytest.mark.parametrize(("dtype", "names"), [("bfloat16", ("amx_bf16", "avx512_bf16")), ("float16", ("avx512_fp16",))])
def test_native_types_agree_with_pytorch(dtype: str, names: tuple[str, ...]) -> None:
    known = torch.cpu.get_capabilities()
    if known["architecture"] != "x86_64":
        pytest.skip("the names are x86's")
    assert processor.multiplies(dtype) == any(known[name] for name in names)


def test_without_cpuinfo_native_types_come_from_pytorch(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "system", lambda: "Windows")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx512_fp16": False}, False)
    assert processor.multiplies("bfloat16") and not processor.multiplies("float16")


def test_auto_uses_bf16_if_the_processor_has_it(cpuinfo: Path) -> None:
    cpuinfo.write_text(EPYC_1)
    assert processor.mixed_precision("auto", gpu=False) == make_accelerator("auto").mixed_precision == "no"
    processor.multiplies.cache_clear()
    cpuinfo.write_text(COOPER_LAKE)
    assert processor.mixed_precision("auto", gpu=False) == "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor.mixed_precision("bf16", gpu=False) == "bf16"
    TrainConfig(mixed_precision="auto").check()


@pytest.mark.parametrize(("has", "word"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_falls_back_to_fp16(monkeypatch: pytest.MonkeyPatch, has: bool, word: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    assert processor.mixed_precision("auto", gpu=True) == word


def test_an_emulated_type_gives_a_warning_with_its_slowdown(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo.write_text(EPYC_1)
    monkeypatch.setattr(processor, "slowdown", lambda dtype: 17.7)
    with pytest.warns(UserWarning, match="emulates bfloat16.* about 18 times slower than float32; use --mixed"):
        assert processor.mixed_precision("bf16", gpu=False) == "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor.mixed_precision("bf16", gpu=True) == "bf16"
        assert processor.mixed_precision("no", gpu=False) == "no"


def test_the_slowdown_is_measured_on_the_fastest_calls() -> None:
    stamps = iter([0.0, 3.0, 10.0, 12.0, 20.0, 29.0])
    calls: list[int] = []
    assert processor.least_seconds(lambda: calls.append(1), 3, lambda: next(stamps)) == 2.0
    assert len(calls) == 4
    assert processor.slowdown("bfloat16") > 0


class Layers(nn.Module):
    """A small network with a convolution, an attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        h = h + nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        return self.out(h @ (h.transpose(1, 2) @ h).softmax(-1))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_wide_products_match_native_half_precision(dtype: torch.dtype, roundoff: float) -> None:
    torch.manual_seed(0)
    net = Layers().eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        exact = net(x)
        net, x = net.to(dtype), x.to(dtype)
        native = net(x)
        with modules.wide_products():
            wide = net(x)
    assert wide.dtype == native.dtype == dtype
    # same roundings as the native run, up to the order of sums; both differ from float32 by a few roundoffs
    assert relative(wide, native) < 8 * roundoff
    for out in (wide, native):
        assert roundoff / 8 < relative(out, exact) < 8 * roundoff


def test_products_round_once_and_overflow_as_half_precision_does() -> None:
    a = torch.full((1, 4096), 1.0, dtype=torch.float16)
    with torch.no_grad(), modules.wide_products():
        assert (a @ a.T).item() == 4096.0  # a sum kept in float16 would stop at 2048
        assert torch.isinf(a @ (a.T * 32)).all()  # 131072 is above 65504
        assert (a.float() @ a.float().T).dtype == torch.float32


@pytest.mark.parametrize("emulated", [True, False])
def test_parity_of_a_module_is_measured_in_its_own_type(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    monkeypatch.setattr(processor, "multiplies", lambda dtype: not emulated)
    torch.manual_seed(0)
    net = nn.Linear(64, 64).half()
    x = torch.randn(8, 64).half()
    with torch.no_grad():
        exact = nn.functional.linear(x.float(), net.weight.float(), net.bias.float()).numpy()
    calls: list[bool] = []
    own = modules.wide_products
    monkeypatch.setattr(modules, "wide_products", lambda: calls.append(True) or own())
    error = modules.relative_error(net, {"input": x}, exact)
    assert 2.0**-14 < error < 2.0**-10 and bool(calls) == emulated
    assert np.isnan(modules.relative_error(net, {"input": x * np.inf}, exact))
