"""Findings of a results document as sentences, and the headline figures of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import largest_batches
from .words import POLICIES, estimate, interval, percent, plural, three_digits

#: Interquartile range over median above which a latency is reported as noisy.
NOISY = 0.1
#: ratio of lower bound to measured time above which the device's peaks must have been measured too low
_FASTER_THAN_POSSIBLE = 1.05
#: arrivals and load in the sentence about serving, and the policies that step by step is compared with
_STATED, _OTHERS = ("poisson", 0.8), ("whole", "one")


def sentences(doc: Mapping[str, Any]) -> list[str]:
    """Findings as sentences: time, compute, and whether quality was evaluated."""
    lines = time_sentences(doc) + serving_sentences(doc)
    for row in doc["methods_cost"]:
        if row["method"] == "guided" and row.get("ratio_to_cfg"):
            lines.append(f"{row['guide']}: one guided step computes {percent(row['ratio_to_cfg'])} of CFG's MACs.")
    if not doc["task_quality_evaluated"]:
        lines.append(quality_sentence(doc))
    return lines


def quality_sentence(doc: Mapping[str, Any]) -> str:
    """State that the images' quality was not evaluated, and why."""
    reason = doc["task_quality_reason"]
    return f"The quality of the images was not evaluated in this run{f': {reason}' if reason else ''}."


def time_sentences(doc: Mapping[str, Any]) -> list[str]:
    """One sentence per engine, at its largest batch size.

    They mark insignificant differences, noisy timing, and peaks that were measured too low.
    """
    lines = []
    for row in largest_batches(doc):
        text = f"{row['engine']}: guided takes {row['ratio_to_cfg']:.2f} of CFG's time per loop at batch {row['batch']}"
        text += f", {plural(row['steps'], 'step')}"
        bounds = row.get("ratio_to_cfg_interval")
        if bounds:
            text += f" (95 % interval {interval(row, 2)}{_rounds(row)})"
            if bounds[0] <= 1 <= bounds[1]:
                text += ", not a statistically significant difference"
        if (row.get("spread") or 0) > NOISY:
            text += f"; the timing was noisy (interquartile range {percent(row['spread'])} of the median)"
        lines.append(text + ".")
    if any((row.get("share_of_least") or 0) > _FASTER_THAN_POSSIBLE for row in doc["latency"]):
        lines.append(
            "Some loops were faster than their least possible time: the device was busy while its peaks were measured. "
            "Run again on an idle machine."
        )
    return lines


def serving_sentences(doc: Mapping[str, Any]) -> list[str]:
    """Sentences per engine: latencies at 80 % load, and throughput with a guide relative to CFG."""
    lines = []
    for serving in doc.get("serving") or ():
        rows = {r["policy"]: r["latency_s"] for r in serving["queues"] if (r["arrivals"], r["load"]) == _STATED}
        if step := rows.get("step"):
            others = [f"{_seconds(rows[other])} for {POLICIES[other]}" for other in _OTHERS if rows.get(other)]
            against = f", against {' and '.join(others)}" if others else ""
            load = f"{serving['engine']}: at {percent(_STATED[1], 0)} load (Poisson)"
            lines.append(f"{load} an image takes {_seconds(step)} step by step{against} (p50 / p95).")
        if (gain := _of_cfg(serving)) is not None:
            lines.append(f"{serving['engine']}: step by step, guided serves {gain:.2f} times as many images as CFG.")
    return lines


def _seconds(latency: Mapping[str, float]) -> str:
    return f"{three_digits(latency['p50'])} / {three_digits(latency['p95'])} s"


def _of_cfg(serving: Mapping[str, Any]) -> float | None:
    """Ratio of images per second with the guide to those with CFG, both step by step."""
    rates = serving["capacity_per_s"]
    return rates["step"] / rates["cfg"] if rates.get("cfg") else None


def _rounds(row: Mapping[str, Any]) -> str:
    return f", {plural(row['rounds'], 'round')}" if "rounds" in row else ""


def headlines(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """Headline figures, each with its name and details, such as its interval."""
    cards = []
    for row in largest_batches(doc):
        bounds = interval(row, 2)
        ci = f", 95 % interval {bounds}" if bounds else ""
        cards.append(
            {
                "value": f"{row['ratio_to_cfg']:.2f} ×",
                "name": "CFG's time per loop",
                "detail": f"{row['engine']}, batch {row['batch']}, {plural(row['steps'], 'step')}{ci}{_rounds(row)}",
            }
        )
    guided = [row for row in doc["methods_cost"] if row["method"] == "guided"]
    for row in guided:
        if row.get("ratio_to_cfg"):
            cards.append(
                {
                    "value": percent(row["ratio_to_cfg"]),
                    "name": "of CFG's compute per step",
                    "detail": f"{row['guide']}, MACs with attention products",
                }
            )
    sizes = {row["network"]: row["parameters"] for row in doc["cost"]}
    for row in guided:
        if sizes.get("teacher") and row["guide"] in sizes:
            cards.append(
                {
                    "value": percent(sizes[row["guide"]] / sizes["teacher"]),
                    "name": "of the teacher's parameters",
                    "detail": f"{row['guide']}, {sizes[row['guide']]:,} trained; the teacher is unchanged",
                }
            )
    return cards + _serving_headlines(doc) + _kid_headline(doc)


def _serving_headlines(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """A server's throughput with the guide, relative to CFG."""
    return [
        {
            "value": f"{gain:.2f} ×",
            "name": "CFG's images per second",
            "detail": f"{serving['engine']}, step by step, {plural(serving['slots'], 'slot')}",
        }
        for serving in doc.get("serving") or ()
        if (gain := _of_cfg(serving)) is not None
    ]


def _kid_headline(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """The guide's KID beside CFG's at the w nearest to 3 and the largest number of steps that both have."""
    judged = [row for row in doc["fidelity"] if row.get("kid")]
    kid = {
        (row["method"], row["steps"], row["guidance"]): row for row in reversed(judged)
    }  # the first engine's row has priority
    both = [key[1:] for key in kid if key[0] == "guided" and ("cfg", *key[1:]) in kid and key[2] is not None]
    if not both:
        return []
    steps, w = max(both, key=lambda item: (-abs(item[1] - 3), item[0]))
    row = kid["guided", steps, w]
    guided, cfg = row["kid"], kid["cfg", steps, w]["kid"]
    intervals = " and ".join(estimate(item, 3).partition(" ")[2] for item in (guided, cfg))
    details = f"{row['engine']}, lower is better; {plural(steps, 'step')}, w = {w:g}, {guided['count']} images"
    return [
        {
            "value": f"{guided['value']:.3f}",
            "name": f"KID; CFG has {cfg['value']:.3f}",
            "detail": f"{details}, 95 % intervals {intervals}",
        }
    ]
