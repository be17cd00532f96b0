"""The doctor on simulated installations: what works, what is missing, and which commands it suggests."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pnp_trt.cli import doctor

ALL = {name for groups in doctor.EXTRAS.values() for group in groups for name in group[:1]}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A simulated installation (distribution -> version) with every module and no required versions."""
    packages = dict.fromkeys(ALL, "1.0")
    monkeypatch.setattr(doctor, "_version", packages.get)
    monkeypatch.setattr(doctor, "_module_exists", lambda module: True)
    monkeypatch.setattr(doctor, "_required_versions", dict)
    return packages


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def show(checks: list[doctor.Check]) -> str:
    console = Console(width=200, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(doctor.render(checks))
    return capture.get()


def without(packages: dict[str, str], *extras: str) -> None:
    for extra in extras:
        for group in doctor.EXTRAS[extra]:
            packages.pop(group[0], None)


def test_a_complete_installation_is_ok(installed: dict[str, str]) -> None:
    checks = doctor.diagnose()
    assert doctor.ok(checks)
    assert {check.state for check in checks if check.kind in ("command", "package")} == {"ok"}


def test_an_installation_that_can_only_sample(installed: dict[str, str]) -> None:
    without(installed, "build", "train", "fidelity", "bench", "tensorrt", "rtx")
    checks = doctor.diagnose()
    results = by_name(checks)
    assert doctor.ok(checks)
    assert str(results["visualize"].fix).endswith("[build,bench]'")
    assert results["sample"].state == "ok"
    assert {results[name].state for name in ("build", "bench", "distill")} == {"missing"}
    assert "missing: torch, diffusers" in results["build"].detail
    assert results["build"].fix is not None
    assert results["build"].fix.endswith("[build]'")
    assert results["distill"].fix is not None
    assert results["distill"].fix.endswith("[build,train]'")
    text = show(checks)
    assert "To fix it" in text
    assert results["build"].fix in text


def test_missing_base_package_stops_sampling(installed: dict[str, str]) -> None:
    del installed["tokenizers"]
    checks = doctor.diagnose()
    results = by_name(checks)
    assert not doctor.ok(checks)
    assert results["tokenizers"].state == "missing"
    assert set(results["tokenizers"].needed_by) >= {"sample", "build", "bench", "distill"}
    assert results["sample"].fix == doctor.install("")


def test_broken_install_is_reported(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_module_exists", lambda module: module != "torch")
    results = by_name(doctor.diagnose())
    assert (results["torch"].state, results["build"].state, results["sample"].state) == ("broken", "broken", "ok")
    assert results["torch"].fix is not None
    assert "--force-reinstall --no-deps torch==1.0" in results["torch"].fix
    assert results["build"].fix == results["torch"].fix


def test_two_conflicting_runtimes_are_a_warning(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.update({"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"})
    checks = doctor.diagnose()
    check = by_name(checks)[doctor._RUNTIME[0]]
    assert check.state == "warning"
    assert check.fix is not None
    assert "uninstall -y" in check.fix
    assert check.fix in show(checks)
    assert doctor.ok(checks)


def test_unsupported_version_is_a_warning(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"pillow": specifiers.SpecifierSet(">=11,<13")})
    installed["pillow"] = "13.0.0"
    check = by_name(doctor.diagnose())["pillow"]
    assert check.state == "warning"
    assert "13.0.0; <13,>=11 is supported" in check.detail


def test_sample_lists_engines_and_needs_none(installed: dict[str, str], tmp_path: Path) -> None:
    """The bundled model's engine is assembled from the package, without the packages of a build."""
    without(installed, "build")
    checks = doctor.diagnose(tmp_path)
    assert doctor.ok(checks)
    assert "the first call assembles the bundled model's" in by_name(checks)["sample"].detail
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "manifest.json").write_text("{}")
    assert by_name(doctor.diagnose(tmp_path))["sample"].detail.endswith(": emoji")


def test_gpu_states(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", refuse)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._gpu().state == "absent"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi")
    assert doctor._gpu().state == "warning"
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: FakeDriver())
    assert doctor._gpu().detail == "Fake GPU 0, Fake GPU 1"


class FakeDriver:
    """Answers like a CUDA driver with two devices."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = f"Fake GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return 0


def test_a_missing_cuda_provider_is_reported(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = doctor.Check("gpu", "machine", "ok")
    monkeypatch.setattr(doctor, "_HAS_CUDA_BUILD", True)
    installed.pop("onnxruntime-gpu", None)
    assert doctor._cuda_provider(gpu).state == "missing"
    monkeypatch.setattr(doctor, "_HAS_CUDA_BUILD", False)
    assert doctor._cuda_provider(gpu).state == "absent"


def test_backends_report_what_they_need(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    none, some = doctor.Check("gpu", "machine", "absent"), doctor.Check("gpu", "machine", "ok")
    monkeypatch.setattr(doctor, "_gpu", lambda: none)
    results = by_name(doctor.diagnose())
    assert (
        results["--backend tensorrt-rtx"].state == "ok"
        and "run on another machine" in results["--backend tensorrt-rtx"].detail
    )
    assert (results["--backend tensorrt"].state, results["--backend tensorrt"].fix) == ("absent", None)
    assert (results["bench, energy column"].state, results["bench, energy column"].fix) == ("absent", None)
    without(installed, "rtx", "tensorrt")
    results = by_name(doctor.diagnose())
    assert (
        results["--backend tensorrt-rtx"].state == "missing"
        and "tensorrt-rtx" in results["--backend tensorrt-rtx"].detail
    )
    assert str(results["--backend tensorrt-rtx"].fix).endswith("[rtx]'")
    assert results["--backend onnxruntime"].state == "ok"
    monkeypatch.setattr(doctor, "_gpu", lambda: some)
    assert str(by_name(doctor.diagnose())["--backend tensorrt"].fix).endswith("[tensorrt]'")


def test_old_python_is_refused(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    checks = doctor.diagnose()
    assert not doctor.ok(checks)
    assert "99.0 or newer is needed" in by_name(checks)["python"].detail


def test_json_form(installed: dict[str, str]) -> None:
    report = json.loads(json.dumps(doctor.as_dict(doctor.diagnose())))
    assert report["ok"] is True
    assert {"name", "kind", "state", "detail", "fix", "needed_by"} == set(report["checks"][0])


def test_the_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pnp_trt.cli import doctor; doctor.as_dict(doctor.diagnose());"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_extras_match_the_project_file() -> None:
    source = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
    requirements = pytest.importorskip("packaging.requirements")

    def names(lines: list[str]) -> set[str]:
        distributions = {requirements.Requirement(line).name for line in lines} - {"pnp-trt", *doctor._RUNTIME}
        return distributions

    for extra, groups in doctor.EXTRAS.items():
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
        assert names(lines) == {group[0] for group in groups} - {*doctor._RUNTIME}, extra


def test_the_doctor_runs_on_this_installation() -> None:
    results = by_name(doctor.diagnose())
    assert results["numpy"].detail.startswith(importlib.metadata.version("numpy"))
    assert show(list(results.values()))


def test_advice_does_not_stop_setuptools_from_loading() -> None:
    """In Python 3.11, searching for pip through setuptools' finder breaks later imports of setuptools."""
    code = "from pnp_trt.cli import doctor; doctor._pip(); import setuptools; print(setuptools.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "setuptools\n", done.stderr
