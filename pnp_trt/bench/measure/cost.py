"""Count a network's parameters and multiply-accumulates (MACs), on meta tensors and without weights.

There are two counts, because published tables differ in which one they print:

* `macs` includes every matrix product of a forward: convolutions, linear layers and the attention products
  (queries x keys, probabilities x values);
* `macs_without_attention` includes convolutions and linear layers only. The published figures of the
  plug-and-play distillation paper are of this kind; they are labelled "FLOPs", but are giga-MACs.

One MAC is two floating-point operations. Neither count includes normalisation, activations, softmax, biases and
additions, as is usual. Causal attention is counted in full, as if nothing were masked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...sampling.methods import CFG, METHODS
from .published import published_rows as published_rows  # re-exported

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

TEACHER = "teacher"
GUIDE_PREFIX = "guide"
#: Networks that run once per image rather than once per step.
IMAGE_NETWORKS = ("text-encoder", "text-encoder-2", "vae-decoder")
#: Prefix of the part of a guide that depends only on w; with that guide, it also runs once per image.
CONDITION_PREFIX = "condition-"


@dataclass(frozen=True)
class Cost:
    """Cost of one forward of a network, at the batch size of the inputs it was counted with (use 1).

    parameters: number of weights, counting shared ones once.
    macs: multiply-accumulates, attention products included.
    macs_without_attention: multiply-accumulates of convolutions and linear layers only.
    """

    parameters: int
    macs: int
    macs_without_attention: int


def count(module: torch.nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> Cost:
    """Count one forward of `module` on `inputs` (keyword arguments as a dict, or positional ones as a tuple).

    Weights and tensors may be on any device: the forward runs on a meta copy, so it takes almost no time or memory, and
    `module` is unchanged. Only the shapes and dtypes of tensors in `inputs` are used, never their values.

    Raises InputError when the forward cannot run on meta tensors (for example because it reads a tensor's value).
    """
    import torch

    with _quiet_flop_counter():
        from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

    parameters = sum(parameter.numel() for parameter in module.parameters())
    network = _meta_copy(module).eval()
    arguments = _to_meta(inputs)
    # Attention called inside another torch function (nn.MultiheadAttention) only reaches the dispatcher's counter,
    # whose table lacks the CPU's fused operator.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    function_counter = _function_counter(counter)
    try:
        with torch.no_grad(), counter, function_counter:
            if isinstance(arguments, Mapping):
                network(**arguments)
            else:
                network(*arguments)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The cost of {type(module).__name__} cannot be counted: its forward failed on meta tensors ({error}); "
            "check the shapes of the inputs and that the forward does not read tensor values."
        ) from error
    flops = {str(operator): number for operator, number in counter.get_flop_counts().get("Global", {}).items()}
    # Products of two activations (unfused attention) reach the counter as batched matrix products. So can a linear
    # layer with a non-contiguous input, which is why the products inside `linear` are subtracted again.
    attention = sum(number for operator, number in flops.items() if _is_batched_product(operator))
    attention -= function_counter.batched_flops_of_linear
    total = sum(flops.values()) + function_counter.attention_flops
    without_attention = sum(flops.values()) - attention
    return Cost(parameters=parameters, macs=total // 2, macs_without_attention=without_attention // 2)


def cost_rows(
    networks: Mapping[str, tuple[torch.nn.Module, Mapping[str, Any] | Sequence[Any]]],
) -> list[dict[str, Any]]:
    """Return one row per network: `network`, `parameters`, `macs`, `macs_without_attention` and `per`, at batch 1.

    `networks` maps a name (`teacher`, `guide-tiny`, `guide-full`, `text-encoder`, `vae-decoder`) to a module and the
    inputs of one forward at batch 1. `per` states how often the network runs: "step" or "image".
    """
    if not networks:
        raise InputError("There is no network to count; give at least the teacher.")
    rows = []
    for name, (module, inputs) in networks.items():
        cost = count(module, inputs)
        once = name in IMAGE_NETWORKS or name.startswith(CONDITION_PREFIX)
        rows.append({"network": name, **asdict(cost), "per": "image" if once else "step"})
    return rows


def method_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    guided_steps: int | None = None,
    evaluations: Callable[[int], int] = int,
) -> list[dict[str, Any]]:
    """Return totals per method from the rows of `cost_rows`, for one image of `steps` steps at batch 1.

    `METHODS` defines how often a method runs the teacher. `guided_steps` is the number of evaluations inside the
    interval of the methods that have one; None leaves these methods out. `evaluations` maps a number of steps to the
    number of predictions under the schedule. Methods with a guide have one row per guide, which runs once per
    prediction.

    Each row has `method`, `guide`, `parameters` (of the networks that run in each step), `networks` (those that run for
    one prediction; if steps differ, for the costliest), `evaluations` (of the teacher), `steps`, `macs_per_step` and
    `macs_per_step_without_attention` (mean over the steps), `macs_per_image`, `macs_per_image_without_attention`, and
    `ratio_to_cfg` and `ratio_to_cfg_without_attention` (MACs of all steps over those of CFG in `steps` steps, with and
    without attention products). An image includes one run of the text encoder (CFG's empty prompt is encoded once and
    cached), of the VAE decoder and of the guide's condition, if they were counted; `image_includes` names them.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1 to count an image, got {steps}.")
    if guided_steps is not None and not 0 <= guided_steps <= evaluations(steps):
        raise InputError(f"guided_steps must be from 0 to the {evaluations(steps)} steps, got {guided_steps}.")
    by_name = {row["network"]: row for row in rows}
    teacher = by_name.get(TEACHER)
    if teacher is None:
        raise InputError(f"The cost per method needs the network '{TEACHER}', got {', '.join(by_name) or 'none'}.")
    guides = [name for name in by_name if name.startswith(GUIDE_PREFIX)]
    runs = []
    for method in sorted(METHODS.values(), key=lambda method: method.guided):
        if method.has_interval and guided_steps is None:
            continue
        steps_run = method.steps(steps)
        total_evaluations = method.evaluations(evaluations(steps_run), guided_steps)
        runs += [
            _Run(method.name, guide, steps_run, evaluations(steps_run), total_evaluations)
            for guide in (guides if method.guided else [None])
        ]
    return [_method_row(run, by_name, evaluations(steps)) for run in runs]


@dataclass(frozen=True)
class _Run:
    """Numbers of steps, predictions and teacher evaluations of a method per image; a guide runs once per prediction."""

    method: str
    guide: str | None
    steps: int
    predictions: int
    evaluations: int


def _method_row(run: _Run, by_name: Mapping[str, Mapping[str, Any]], cfg_evaluations: int) -> dict[str, Any]:
    teacher = by_name[TEACHER]
    guides = [by_name[run.guide]] if run.guide else []
    condition = CONDITION_PREFIX + (run.guide or "").removeprefix(f"{GUIDE_PREFIX}-")
    once = [name for name in (*IMAGE_NETWORKS, condition) if name in by_name]
    most = 2 if run.evaluations > run.predictions else 1
    row: dict[str, Any] = {
        "method": run.method,
        "guide": run.guide,
        "networks": [network["network"] for network in (*[teacher] * most, *guides)],
        "evaluations": run.evaluations,
        "parameters": sum(network["parameters"] for network in (teacher, *guides)),
        "steps": run.steps,
        "image_includes": once,
    }
    for suffix, key in (("", "macs"), ("_without_attention", "macs_without_attention")):
        loop = run.evaluations * int(teacher[key]) + run.predictions * sum(int(n[key]) for n in guides)
        row[f"macs_per_step{suffix}"] = loop // run.steps
        row[f"macs_per_image{suffix}"] = loop + sum(int(by_name[name][key]) for name in once)
        row[f"ratio_to_cfg{suffix}"] = (
            loop / (CFG.evaluations(cfg_evaluations) * teacher[key]) if teacher[key] else None
        )
    return row


def _is_batched_product(operator: str) -> bool:
    return operator.split(".")[-1] in ("bmm", "baddbmm") or "attention" in operator


def _function_counter(counter: Any) -> Any:
    """Return a function mode that counts fused attention, and separately the batched products of linear layers.

    On the meta device `scaled_dot_product_attention` decomposes into operators that differ between torch releases;
    counting above the dispatcher gives the same number for all.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import sdpa_flop_count

    class Counter(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.attention_flops = 0
            self.batched_flops_of_linear = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.nn.functional.scaled_dot_product_attention:
                query, key, value = _attention_operands(args, kwargs)
                query_shape, key_shape, value_shape = _four_dimensions(query.shape, key.shape, value.shape)
                self.attention_flops += sdpa_flop_count(query_shape, key_shape, value_shape)
                return query.new_empty((*query.shape[:-1], value.shape[-1]))
            if func is torch.nn.functional.linear:
                before = self._batched()
                result = func(*args, **kwargs)
                self.batched_flops_of_linear += self._batched() - before
                return result
            return func(*args, **kwargs)

        def _batched(self) -> int:
            counts = counter.get_flop_counts().get("Global", {})
            return sum(number for operator, number in counts.items() if _is_batched_product(str(operator)))

    return Counter()


def _attention_operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    names = ("query", "key", "value")
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return query, key, value


def _four_dimensions(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return shapes as [1, batch * heads, tokens, width], counting keys and values that heads share once per head."""
    shapes = []
    for shape in (query, key, value):
        batch = 1
        for size in query[:-2]:
            batch *= size
        shapes.append((1, batch, shape[-2], shape[-1]))
    return tuple(shapes)


def _meta_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with parameters and buffers on the meta device; no weight is copied and `module` is unchanged."""
    import torch

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo).to("meta")


def _to_meta(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item) for item in value)
    return value


@contextmanager
def _quiet_flop_counter() -> Iterator[None]:
    """Silence the warning at import that triton is missing, which concerns only triton kernels."""
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
