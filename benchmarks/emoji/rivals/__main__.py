"""Rivals of the guides on the bundled model: train, measure, and write the page.

``python -m benchmarks.emoji.rivals train`` trains every rival for the same number of optimizer steps, except existing
ones.  ``measure`` samples and measures all trained rivals.  ``report`` writes ``docs/rivals.md`` from the JSON.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from pnp_trt.errors import InputError

from ...records import add_sampling_options, read
from . import JOINT, PAGE, RIVALS


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=RATE, got {text!r}") from None


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of steps, separated by commas, got {text!r}")
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.rivals", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_subparsers(dest="what", required=True)
    one, two = what.add_parser("train"), what.add_parser("measure")
    for each in (one, two):
        each.add_argument("--data", type=Path, default=Path("build/emoji/pack.npz"))
        each.add_argument("--assets", type=Path, default=Path("pnp_trt/assets"))
        each.add_argument("--out", type=Path, default=Path("build/emoji/rivals"), help="folder of the trained rivals")
    one.add_argument("--steps", type=int, default=1500, help="optimizer steps of each rival")
    one.add_argument("--batch", type=int, default=256)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--only", default="", help=f"names, separated by commas; default: all of {', '.join(RIVALS)}")
    one.add_argument(
        "--lr", type=_rate, action="append", default=[], metavar="NAME=RATE", help="a peak learning rate; repeatable"
    )
    one.add_argument(
        "--pilot", type=int, default=0, metavar="STEPS",
        help="choose each rival's learning rate among three by trainings of this many steps; 0 uses its own",
    )  # fmt: skip
    one.add_argument(
        "--negative", action="store_true",
        help="train with a negative prompt for each state, for benchmarks.emoji.negative --rivals",
    )  # fmt: skip
    two.add_argument("--json", type=Path, default=PAGE.record)
    two.add_argument("--steps", type=_counts, default="50,16,8", help="numbers of steps on the base, comma-separated")
    two.add_argument("--tuned-steps", type=_counts, default="16", help="numbers of steps in the fine-tunes")
    two.add_argument(
        "--error-batches", type=int, default=12, help="batches of 256 fresh states for the error; 0 for none"
    )
    add_sampling_options(two, "number of images per cell", 64)
    two.add_argument(
        "--processes", type=int, default=1, help="number of processes that measure, and on a CPU also sample"
    )
    three = what.add_parser("report")
    three.add_argument("--joint", action="store_true", help=f"write {JOINT.document} from {JOINT.record} instead")
    three.add_argument("--json", type=Path, help="another record")
    three.add_argument("--document", type=Path, help="another page")
    a = parser.parse_args(arguments)
    try:
        if a.what == "report":
            from .report import write_report

            page = JOINT if a.joint else PAGE
            record = a.json or page.record
            if not record.is_file():
                raise InputError(f"{record} does not exist; run: python -m benchmarks.emoji.rivals measure")
            write_report(read(record), a.document or page.document, page)
        elif a.what == "measure":
            from ..provenance import relative
            from .measure import measure

            words = ["python", "-m", "benchmarks.emoji.rivals", "measure", "--images", str(a.images)]
            words += ["--device", a.device, "--batch", str(a.batch)]
            for option, value in (
                ("steps", ",".join(map(str, a.steps))), ("tuned-steps", ",".join(map(str, a.tuned_steps))),
                ("error-batches", str(a.error_batches)), ("out", relative(a.out)), ("json", relative(a.json)),
            ):  # fmt: skip
                if value != str(two.get_default(option.replace("-", "_"))):
                    words += [f"--{option}", value]
            measure(
                a.assets, a.data, a.out, a.judge, a.cache, a.json, images=a.images, device=a.device, batch=a.batch,
                processes=a.processes, command=shlex.join(words), steps=a.steps, tuned=a.tuned_steps,
                rounds=a.error_batches,
            )  # fmt: skip
        else:
            from .train import train

            only = [name.strip() for name in a.only.split(",") if name.strip()]
            train(a.assets, a.data, a.out, a.steps, a.batch, a.seed, only or None, dict(a.lr), a.pilot, a.negative)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
