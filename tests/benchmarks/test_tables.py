"""The tables: the sampler against diffusers' own loop, the list of cells, resuming, verdicts, and the document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks.emoji import ablation, compare, network, runner, tables, tables_report  # noqa: E402  (needs torch)
from benchmarks.emoji.cells import BEST, INTERVALS, Cell, all_cells  # noqa: E402
from benchmarks.emoji.sampler import Ask, Guidance, Sampler, denoise  # noqa: E402
from benchmarks.records import read  # noqa: E402
from pnp_trt.assets import ROOT  # noqa: E402
from pnp_trt.bench.measure import cost  # noqa: E402
from pnp_trt.bench.metrics import fidelity  # noqa: E402
from pnp_trt.errors import InputError  # noqa: E402
from pnp_trt.models.bases import resolve  # noqa: E402
from pnp_trt.models.guides.load import load_guide  # noqa: E402
from pnp_trt.models.student import Student  # noqa: E402
from pnp_trt.models.teacher import BaseModel  # noqa: E402
from tests.conftest import make_micro_base  # noqa: E402

REPOSITORY = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def parts(micro_base: Path, micro_guide: Path) -> tuple[Sampler, Any]:
    return Sampler(micro_base), load_guide(str(micro_guide))


@pytest.mark.parametrize(
    "how",
    [Guidance("none"), Guidance("cfg", 3.0), Guidance("guided", 5.0), Guidance("interval", 4.0, (200, 700))],
    ids=lambda how: how.kind,
)
def test_the_loop_equals_diffusers_ddim(parts: tuple[Sampler, Any], how: Guidance, micro_base: Path) -> None:
    from diffusers import DDIMScheduler

    sampler, guide = parts
    unet = resolve(str(micro_base)).unet()
    student = Student(unet, guide)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, empty = sampler.text(["a red apple", "a panda"]), sampler.text([""])
    scheduler = DDIMScheduler.from_pretrained(micro_base / "scheduler")
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            if how.kind == "guided":
                noise_w = student(x, t.expand(2), text, torch.full((2,), how.w))
            else:
                with_text, without = unet(x, t, text).sample, unet(x, t, empty.expand_as(text)).sample
                inside = how.kind == "cfg" or (how.interval and how.interval[0] <= t <= how.interval[1])
                noise_w = without + how.w * (with_text - without) if inside else with_text
            x = scheduler.step(noise_w, t, x).prev_sample
    one = network.Network(unet, guide if how.kind == "guided" else None, "float32", compiled=False)
    ticks: list[int] = []
    ours = denoise(one, sampler.schedule(5), noise, text, empty, how, ticks.append)
    assert sum(ticks) == 2 * how.evaluations(sampler.schedule(5))
    # the first step amplifies latents and their rounding errors a hundredfold
    assert (ours - x).norm() < 5e-5 * x.norm()


def test_an_interval_that_covers_everything_equals_cfg(parts: tuple[Sampler, Any]) -> None:
    sampler, _ = parts
    rows = [Ask("red-apple", "noto", 1), Ask("panda", "noto", 2), Ask("fox", "noto", 3)]
    schedule = sampler.schedule(4)
    whole = sampler.draw(rows, sampler.predict, Guidance("interval", 3.0, (0, 999)), schedule)
    assert np.array_equal(whole, sampler.draw(rows, sampler.predict, Guidance("cfg", 3.0), schedule))
    nothing = sampler.draw(rows, sampler.predict, Guidance("interval", 3.0, (1000, 1001)), schedule)
    assert np.array_equal(nothing, sampler.draw(rows, sampler.predict, Guidance("none"), schedule))


def test_invalid_guidance_is_refused() -> None:
    with pytest.raises(InputError, match="available: none, cfg, interval, guided, cached, residual"):
        Guidance("magic")
    with pytest.raises(InputError, match="only 'interval' takes one"):
        Guidance("cfg", 3.0, (1, 2))


def test_batches_of_one_size_are_padded(parts: tuple[Sampler, Any]) -> None:
    """A compiled network gets batches of one size; here it is not compiled."""
    sampler, guide = parts
    one = network.Network(sampler.unet, guide, "float32", compiled=False, batch=2)
    x, text = torch.randn(3, 4, 8, 8), sampler.text(["a", "b", "c"])
    t, w = torch.tensor([9, 500, 999]), torch.tensor([1.0, 3.0, 8.0])
    plain = one(x, t, text, w)
    one.compiled, sizes = True, []

    def run(*inputs: Any) -> Any:
        sizes.append(len(inputs[0]))
        return one.module(*inputs)

    one._run = run
    torch.testing.assert_close(one(x, t, text, w), plain, atol=1e-5, rtol=1e-4)
    assert sizes == [2, 2]


def test_a_network_that_does_not_compile_runs_eager(parts: tuple[Sampler, Any]) -> None:
    sampler, _ = parts
    one = network.Network(sampler.unet, None, "float32", compiled=False, batch=2)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([9]), sampler.text(["a"]), torch.ones(1)
    plain = one(*inputs)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    one.compiled, one._run = True, fail
    torch.testing.assert_close(one(*inputs), plain, atol=1e-5, rtol=1e-4)
    assert one.trouble == "RuntimeError: no C++ compiler" and not one.compiled


def test_settle_takes_the_first_precision_that_shows_no_difference(
    parts: tuple[Sampler, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, guide = parts
    seen = []
    spoilt = {"bfloat16"}

    def draw(predict: Any) -> np.ndarray:
        seen.append(predict.precision)
        predict(torch.randn(1, 4, 8, 8), torch.tensor([9]), sampler.text(["a"]), torch.full((1,), 3.0))
        return np.full((2, 8, 8, 3), 200 if predict.precision in spoilt else 20, np.uint8)

    monkeypatch.setattr(network, "multiplies", lambda _: True)
    one, record = network.settle(sampler.unet, guide, draw, compiled=False)
    assert seen == ["float32", network.BFLOAT16, network.MIXED]
    assert one.precision == record["precision"] == network.MIXED and record["psnr_db"]["bfloat16"] < 30
    spoilt.add(network.MIXED)
    assert network.settle(sampler.unet, guide, draw, compiled=False)[0].precision == "float32"
    monkeypatch.setattr(network, "multiplies", lambda _: False)
    assert network.settle(sampler.unet, guide, draw)[1]["psnr_db"] == {}


# ---------------------------------------------------------------------------------------------------- the cells


def test_cells_are_complete_and_unique() -> None:
    cells = all_cells()
    assert len(set(cells)) == len(cells)
    a, b, c = ([x for x in cells if x.table == t] for t in "ABC")
    once = {(x.method, x.steps, x.w) for x in a if x.captions == "train"}
    grid = {(m, s, w) for m in ("cfg", "tiny", "full") for s in (50, 16, 12, 8, 4) for w in (2.0, 3.0, 5.0, 8.0)}
    assert once == grid | {("tiny-stage2", s, w) for s in (16, 8, 4) for w in (2.0, 3.0, 5.0, 8.0)}
    headline = {("cfg", s) for s in (50, 16, 12, 8)} | {("tiny", s) for s in (50, 16, 12, 8)}
    headline |= {("tiny-stage2", s) for s in (16, 8)}
    for captions in ("train", "held_out", "held_out_colour_shape"):
        seeds = Counter((x.method, x.steps) for x in a if x.captions == captions and x.w == 3.0)
        assert {k for k, n in seeds.items() if n == 3} == headline
    assert len(a) == 18 * 4 + 10 * 2 + 2 * 10 * 3
    assert Counter((x.base, x.steps) for x in b) == {
        ("emoji-flat", 50): 8, ("emoji-flat", 16): 10, ("emoji-flat", 8): 10,
        ("emoji-3d", 50): 8, ("emoji-3d", 16): 10, ("emoji-3d", 8): 10,
    }  # fmt: skip
    assert {x.captions == x.base for x in b} == {True}
    free = dict.fromkeys(
        ("cached-2", "cached-3", "cached-4", "residual", "rising", "falling", "anchors-4", "anchors-8"), 8
    )
    own = {"none": 8, "cfg": 14, "tiny": 8, "tiny-stage2": 4, "interval": 24}
    assert Counter(x.method for x in c) == {**own, **free}
    # cells without a guide come first, and the sweep of intervals before the cells that use its best one
    assert [x.guide is None for x in cells] == sorted((x.guide is None for x in cells), reverse=True)
    assert max(cells.index(x) for x in c if x.captions == "sweep") < min(
        cells.index(x) for x in c if x.interval == BEST
    )
    with pytest.raises(InputError, match="seeds must be 1 to 9, got 0"):
        all_cells(0)


def test_numbers_of_evaluations_and_the_best_interval() -> None:
    schedule = Sampler.schedule(type("S", (), {"schedule_config": {}})(), 25)  # type: ignore[arg-type]
    assert Cell("C", "cfg", "emoji", 25, 3.0).guidance().evaluations(schedule) == 50
    assert Cell("C", "none", "emoji", 25, 3.0).guidance().evaluations(schedule) == 25
    best = Cell("C", "interval", "emoji", 25, 3.0, interval=BEST)
    assert best.guidance("sdxl").interval == INTERVALS["sdxl"]
    with pytest.raises(InputError, match="best interval at 25 steps and w = 3 is unknown before the sweep"):
        best.guidance()


# -------------------------------------------------------------------------------------------------- the verdicts


def estimate(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "count": 9}


def test_outcomes() -> None:
    assert [compare.outcome(estimate(v)) for v in (0.1, 0.01, -0.1)] == ["better", "no difference shown", "worse"]
    assert [compare.no_worse(estimate(v)) for v in (0.1, 0.01, -0.1)] == [True, True, False]


def test_goals_follow_the_intervals_or_are_not_measured() -> None:
    def group(method: str, steps: int, against: int, value: float) -> dict[str, Any]:
        gain = {"kid": estimate(value), "R@1": estimate(-0.1), "R@5": estimate(0)}
        return {
            "table": "A", "method": method, "steps": steps, "w": 3.0, "captions": "train", "seeds": [0, 1, 2],
            "gain_over_cfg": {str(against): gain},
        }  # fmt: skip

    verdicts = compare.goal_verdicts([group("tiny", 50, 50, 0.01), group("tiny", 16, 16, -0.1)], 3.0)
    assert [v.get("reached") for v in verdicts] == [True, False, None, None]
    assert verdicts[0]["R@1"] == "worse" and not verdicts[3]["measured"]


def test_a_duel_states_the_winner_and_the_cost() -> None:
    guide = {"method": "tiny", "steps": 16, "evaluations": 16, "w": 3.0, "interval": None}
    rival = {"method": "cfg", "steps": 8, "evaluations": 16, "interval": None}
    gains = {"kid": estimate(-0.1), "R@1": estimate(0.1), "R@5": estimate(0.0)}
    duel = compare.free_verdict(guide, rival, gains)
    assert duel["wins"] == {"kid": "rival", "R@1": "guide"} and duel["rival_costs_no_more"]
    assert not compare.free_verdict(guide, rival | {"evaluations": 17}, gains)["rival_costs_no_more"]


def test_the_document_names_the_rivals_that_win() -> None:
    def duel(evaluations: int, value: float) -> dict[str, Any]:
        guide = {"method": "tiny", "steps": 16, "evaluations": 16, "w": 3.0, "interval": None}
        rival = {"method": "cfg", "steps": evaluations // 2, "evaluations": evaluations, "interval": None}
        return compare.free_verdict(guide, rival, {k: estimate(value) for k in ("kid", "R@1", "R@5")})

    text = tables_report.verdict_c({"verdicts": {"C": [duel(16, -0.1), duel(8, 0.1), duel(32, -0.2)]}})
    fair, dearer = text.split("with more NFE")
    assert "**better by KID: teacher CFG at 8 steps (16 NFE;" in fair and "(1 of 2 shown to be worse)" in fair
    assert "teacher CFG at 16 steps (32 NFE;" in dearer
    text = tables_report.verdict_c({"verdicts": {"C": [duel(16, 0.0)]}})
    assert "no method is shown to be better by KID (0 of 1 shown to be worse)" in text


def test_means_over_noises_resample_captions() -> None:
    rng = np.random.default_rng(0)
    real, a, b = (rng.normal(size=(20, 8)) for _ in range(3))
    assert fidelity.mean_kid(real, [a]) == fidelity.kid(real, a)
    assert fidelity.mean_kid_gain(real, [a], [b]) == fidelity.kid_gain(real, a, b)
    assert fidelity.mean_kid(real, [a, b]).value == pytest.approx(
        (fidelity.kid(real, a).value + fidelity.kid(real, b).value) / 2
    )
    # repeating the same images adds no evidence
    assert fidelity.mean_kid(real, [a, a]) == fidelity.kid(real, a)
    with pytest.raises(InputError, match="equal counts, got 20, 19"):
        fidelity.mean_kid(real, [a, b[1:]])
    with pytest.raises(InputError, match="at least one set"):
        fidelity.mean_kid(real, [])


# ------------------------------------------------------------------------------------------------ the whole run


class Eyes:
    """Fake feature extractor: features of the right width without a network."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1)[:, :: images[0].size // 640][:, :640] / 255.0
        return np.concatenate([flat, np.cos(3 * flat)], 1).astype(np.float32)


def some_cells() -> list[Cell]:
    def selected(cell: Cell) -> bool:
        if cell.table == "A":
            return cell.w == 3.0 and cell.steps in (8, 4) and cell.captions != "held_out_colour_shape"
        if cell.table == "B":
            return cell.base == "emoji-flat" and cell.steps == 16 and cell.w == 3.0
        return cell.w == 3.0 and cell.steps in (16, 8)

    # the reference of their distances
    reference = Cell("A", "cfg", "emoji", 50, 3.0)
    return [*(cell for cell in all_cells(2) if selected(cell)), reference]


@pytest.fixture(scope="module")
def smoke(
    micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """The document of a run on the micro teacher, its folder, and the arguments of the run."""
    home = tmp_path_factory.mktemp("tables")
    other = make_micro_base(home / "other", seed=5)
    tuned = BaseModel("emoji-flat", micro_base, next((other / "unet").glob("*.safetensors")))
    arguments: dict[str, Any] = dict(
        bases={"emoji": resolve(str(micro_base)), "emoji-flat": tuned},
        guides={"tiny": micro_guide, "tiny-8": micro_guide},
        judge=ROOT / "judge.safetensors", cache=home / "build", results=home / "tables.json",
        missing={"full": "the guides' folder holds no 'full'"}, images=4, seeds=2, compiled=False,
        cells=some_cells(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "FeatureExtractor", lambda _device: Eyes())
        patch.setattr(runner, "real_images", lambda rows, *_: np.random.default_rng(0).integers(
            0, 256, (len(rows), 32, 32, 3), dtype=np.uint8))  # fmt: skip
        assert tables.evaluate(**arguments, only_teacher=True) is None
        assert not (home / "tables.json").exists()
        document = tables.evaluate(**arguments)
        assert document is not None
        # a second run samples nothing, and two processes measure the same
        patch.setattr(Sampler, "draw", lambda *_: pytest.fail("sampled again"))
        again = tables.evaluate(**arguments, processes=2)
    assert (
        again is not None
        and again["groups"] == document["groups"]
        and again["verdicts"] == document["verdicts"]
        and again["networks"] == document["networks"]
    )
    return document, home, arguments


def test_a_run_measures_every_cell_and_lists_the_missing_ones(smoke: tuple[dict[str, Any], Path, Any]) -> None:
    document, home, _ = smoke
    written = json.loads((home / "tables.json").read_text())
    assert written["cells"] == json.loads(json.dumps(document["cells"]))
    left = document["left_out"]
    assert len(document["cells"]) + len(left) == len(some_cells())
    assert {c["reason"] for c in left if c["method"] == "full"} == {"the guides' folder holds no 'full'"}
    assert {c["reason"] for c in left if c["method"] == "tiny-stage2"} == {"there is no guide 'tiny-16'"} | {
        "there is no guide 'tiny-4'"
    }
    cell = next(c for c in document["cells"] if (c["method"], c["steps"], c["captions"]) == ("tiny", 8, "train"))
    assert cell["distance_to_cfg"]["50"]["psnr_db"]["count"] == 4 and cell["kid"]["low"] <= cell["kid"]["high"]
    assert len(cell["ranks"].split()) == 4 and (home / "build" / "tables" / f"{cell['cache']}.npz").is_file()
    group = next(g for g in document["groups"] if (g["method"], g["steps"], g["captions"]) == ("tiny", 8, "train"))
    assert group["seeds"] == [0, 1]
    best = next(g for g in document["groups"] if g["interval"] == BEST)
    assert best["interval_chosen"] in INTERVALS and 16 < best["evaluations"] < 32
    # the rules with 8 or 16 steps in one of the budgets
    rules = {"rising", "falling", "cached-2", "anchors-4", "anchors-8"}
    assert {d["rival"]["method"] for d in document["verdicts"]["C"]} == {"none", "cfg", "interval"} | rules
    assert {v["method"] for v in document["verdicts"]["B"]} == {"tiny"}
    assert str(home) not in json.dumps(document)


def test_cells_excluded_by_options_are_listed() -> None:
    cells = all_cells(3)
    bases: Any = dict.fromkeys(("emoji", "emoji-flat", "emoji-3d"))
    guides = dict.fromkeys(("tiny", "tiny-16", "tiny-8", "tiny-4", "full"), Path())
    chosen, left = tables.choose_cells(cells, "ABC", bases, guides, {}, light=True, scales=(3.0, 5.0))
    assert len(chosen) + len(left) == len(cells)
    assert {c["reason"] for c in left} == {"--scales 3,5", "--light, which spares a third of the compute"}
    # headline rows are not skipped: three sets of noise for trained captions, and the held-out captions
    headline = [c for c in chosen if c.table == "A" and c.w == 3.0 and c.method != "full" and c.steps == 16]
    assert {(c.method, c.seed) for c in headline if c.captions == "train"} == {
        (m, seed) for m in ("cfg", "tiny", "tiny-stage2") for seed in range(3)
    }
    assert {c.captions for c in headline} == {"train", "held_out", "held_out_colour_shape"}


def test_sampled_only_leaves_out_cells_without_images(
    smoke: tuple[dict[str, Any], Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, _, arguments = smoke
    monkeypatch.setattr(tables, "FeatureExtractor", lambda _device: Eyes())
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("sampled"))
    gone = next(c for c in document["cells"] if (c["method"], c["steps"], c["captions"]) == ("tiny", 8, "train"))
    image = arguments["cache"] / "tables" / f"{gone['cache']}.npz"
    data = image.read_bytes()
    image.unlink()
    try:
        result = tables.evaluate(**(arguments | {"results": tmp_path / "t.json"}), sampled_only=True)
    finally:
        image.write_bytes(data)
    assert result is not None
    unsampled = [c for c in result["left_out"] if c["reason"] == "not sampled yet"]
    # this run uses the same guide for both stages, so they share the images
    assert {(c["method"], c["steps"]) for c in unsampled} == {("tiny", 8), ("tiny-stage2", 8)}
    assert gone["cache"] not in {c["cache"] for c in result["cells"]}


def test_the_cost_is_the_sum_of_unet_and_guide(smoke: tuple[dict[str, Any], Path, Any], micro_base: Path) -> None:
    document, _, arguments = smoke
    costs = document["costs"]
    sampler, guide = Sampler(micro_base), load_guide(str(arguments["guides"]["tiny"]))
    own = sum(p.numel() for p in guide.parameters())
    assert costs["tiny"]["parameters"] == costs["teacher"]["parameters"] + own
    assert costs["teacher"]["macs"] < costs["tiny"]["macs"] < 1.5 * costs["teacher"]["macs"]
    text = torch.empty(1, 77, 32)
    unet = cost.count(sampler.unet, (torch.empty(1, 4, 8, 8), torch.empty(1, dtype=torch.long), text))
    assert costs["teacher"]["macs"] == unet.macs
    none, cfg = (
        next(g for g in document["groups"] if (g["table"], g["method"], g["steps"]) == ("C", m, s))
        for m, s in (("none", 16), ("cfg", 8))
    )
    assert none["evaluations"] == cfg["evaluations"] == 16 and none["macs_per_image"] == cfg["macs_per_image"]


def test_the_document_is_written_from_json_and_images(smoke: tuple[dict[str, Any], Path, Any]) -> None:
    _, home, _ = smoke
    tables_report.write_report(json.loads((home / "tables.json").read_text()), home / "build", home / "docs")
    text = (home / "docs" / "distillation-tables.md").read_text()
    assert all(f"## Table {t}" in text for t in "ABC")
    assert "holds no 'full'" in text and "not measured" in text and "EfficientNet-KID" in text
    assert "\n\n\n" not in text and "nan" not in text.lower().replace("unan", "")
    for name in ("distillation-grid.png", "distillation-kid.png"):
        assert (home / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_separately_measured_fine_tunes_replace_table_b(
    smoke: tuple[dict[str, Any], Path, Any], tmp_path: Path
) -> None:
    """With ``text_only``, because the images of the other tables may be on another machine."""
    _, home, _ = smoke
    document = json.loads((home / "tables.json").read_text())
    apart = json.loads((home / "tables.json").read_text())
    apart["provenance"] |= {"command": "measure the fine-tunes", "date": "2999-01-01T00:00:00+00:00"}
    for group in apart["groups"]:
        group["kid"]["value"] = 0.4321
    with pytest.raises(InputError, match="image set .* is missing; run the tables again, or give --text-only"):
        tables_report.write_report(document, tmp_path, tmp_path / "docs", apart)
    tables_report.write_report(document, tmp_path, tmp_path / "docs", apart, text_only=True)
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["distillation-tables.md"]
    text = (tmp_path / "docs" / "distillation-tables.md").read_text()
    a, b, c = (part.split("## Table ")[0] for part in text.split("## Table ")[1:])
    assert "measure the fine-tunes" in b and "0.4321" in b and "0.4321" not in a + c
    assert "emoji-flat" in b


def test_an_older_record_of_table_b_is_ignored(smoke: tuple[dict[str, Any], Path, Any], tmp_path: Path) -> None:
    _, home, _ = smoke
    document, apart = (json.loads((home / "tables.json").read_text()) for _ in range(2))
    apart["provenance"] |= {"command": "measure the fine-tunes", "date": "2020-01-01T00:00:00+00:00"}
    tables_report.write_report(document, tmp_path, tmp_path / "docs", apart, text_only=True)
    assert "measure the fine-tunes" not in (tmp_path / "docs" / "distillation-tables.md").read_text()


def test_the_pages_match_the_records(tmp_path: Path) -> None:
    """The text of pages whose figures cannot be drawn again without images or training."""
    results, docs = REPOSITORY / "benchmarks/results", REPOSITORY / "docs"
    records = [read(results / f"emoji-{name}.json") for name in ("tables", "fine-tunes", "ablation")]
    tables_report.write_report(records[0], tmp_path, tmp_path, records[1], text_only=True)
    assert (tmp_path / "distillation-tables.md").read_text() == (docs / "distillation-tables.md").read_text()
    assert ablation.render(records[2]) == (docs / "ablation.md").read_text()


def test_missing_guides_are_listed(micro_guide: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(micro_guide)
    guides, missing = tables.find_guides(tmp_path)
    assert list(guides) == ["tiny"] and set(missing) == {"full", "tiny-16", "tiny-8", "tiny-4"}
    bundled, _ = tables.find_guides(None)
    assert "tiny" in bundled
    with pytest.raises(InputError, match="is not a folder"):
        tables.find_guides(tmp_path / "nothing")


def test_evaluate_refuses_invalid_arguments(tmp_path: Path) -> None:
    where = (tmp_path / "judge.safetensors", tmp_path, tmp_path / "out.json")
    with pytest.raises(InputError, match="at least 4, got 2"):
        tables.evaluate({}, {}, *where, images=2)
    with pytest.raises(InputError, match="unknown table 'D'; available: A, B, C"):
        tables.evaluate({}, {}, *where, only=["A", "D"])
