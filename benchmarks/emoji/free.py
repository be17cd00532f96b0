"""Guidance by fewer evaluations without training: cached differences, R-CFG, anchors with a guide, w over the steps.

Each rule is called once per step, from noise to image, and returns the prediction that the sampler uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: (latents ``[B, C, H, W]``, timesteps ``[B]``, text ``[B, tokens, D]``, w ``[B]``) → prediction ``[B, C, H, W]``
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluate:
    """The network on one batch of images; a guide in it adds nothing at w = 1.

    Attributes:
        predict: U-Net, with a guide or without.
        text, empty: ``[B, tokens, D]`` and ``[1, tokens, D]``.
        w: the scale.
    """

    predict: Predict
    text: Tensor
    empty: Tensor
    w: float

    def once(self, x: Tensor, t: Tensor, w: float, text: Tensor | None = None) -> Tensor:
        """One evaluation at scale ``w``, on the prompts unless ``text`` is given."""
        scale = torch.full((len(x),), w, device=x.device)
        return self.predict(x, t, self.text if text is None else text, scale)

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional prediction, in one doubled batch."""
        texts = torch.cat([self.empty.expand_as(self.text), self.text])
        without, conditional = self.once(torch.cat([x, x]), t.repeat(2), 1.0, texts).chunk(2)
        return without, conditional


class Rule(ABC):
    """How the steps of one run are guided.

    Args:
        evaluate: the network on the run's images.
        steps: steps of the run.
        every: k, for rules that take more evaluations in every k-th step.

    Attributes:
        guided: whether the network has a guide.
        periodic: whether ``every`` is used.
    """

    guided: ClassVar[bool] = False
    periodic: ClassVar[bool] = False

    def __init__(self, evaluate: Evaluate, steps: int, every: int | None) -> None:
        self.evaluate, self.steps, self.every = evaluate, steps, every or 1

    @classmethod
    @abstractmethod
    def evaluations(cls, step: int, every: int | None) -> int:
        """Network evaluations for one image in a step."""

    @abstractmethod
    def __call__(self, step: int, x: Tensor, t: Tensor, signal: float, noise: float) -> Tensor:
        """The prediction of the noise for latents ``x`` at timesteps ``t``, all equal.

        Args:
            signal, noise: √ᾱ and √(1 − ᾱ) there.
        """


class CachedDifference(Rule):
    """eps(c) + (w − 1)·d, with d = eps(c) − eps(∅) from the last step that evaluated both, which every k-th step does.

    This is CFG-Cache (FasterCache: Lv et al., ICLR 2025, arXiv 2410.19355) without its weights for low and high
    frequencies, which are tuned for each model.
    """

    periodic = True

    @classmethod
    def evaluations(cls, step: int, every: int | None) -> int:
        return 2 if step % (every or 1) == 0 else 1

    def __call__(self, step: int, x: Tensor, t: Tensor, signal: float, noise: float) -> Tensor:
        if step % self.every == 0:
            without, conditional = self.evaluate.both(x, t)
            self._difference = conditional - without
        else:
            conditional = self.evaluate.once(x, t, 1.0)
        return conditional + (self.evaluate.w - 1) * self._difference


class ResidualGuidance(Rule):
    """R-CFG with one negative evaluation (StreamDiffusion: Kodaira et al. 2023, arXiv 2312.12491).

    The unconditional prediction of the first step gives a clean latent x̂0; later steps use the noise between x̂0 and
    the current latent, (x − √ᾱ·x̂0) / √(1 − ᾱ), instead of eps(∅).  Its factor δ is 1.  The method is designed for
    starting from images and for w below 2; from pure noise, x̂0 is mostly the first prediction's error divided by √ᾱ,
    which is near 0 there.
    """

    @classmethod
    def evaluations(cls, step: int, every: int | None) -> int:
        return 2 if step == 0 else 1

    def __call__(self, step: int, x: Tensor, t: Tensor, signal: float, noise: float) -> Tensor:
        if step == 0:
            virtual, conditional = self.evaluate.both(x, t)
            self._clean = (x - noise * virtual) / signal
        else:
            conditional = self.evaluate.once(x, t, 1.0)
            virtual = (x - signal * self._clean) / noise
        return virtual + self.evaluate.w * (conditional - virtual)


class Anchors(Rule):
    """A guide corrected by its error relative to CFG, which is measured in every k-th step (an anchor).

    At an anchor the prediction is CFG's, which takes three evaluations: with the guide, without it, and without the
    prompt.  In the j-th step after an anchor, (1 − j/k) of its error is added to the guide's prediction.
    """

    guided, periodic = True, True

    @classmethod
    def evaluations(cls, step: int, every: int | None) -> int:
        return 3 if step % (every or 1) == 0 else 1

    def __call__(self, step: int, x: Tensor, t: Tensor, signal: float, noise: float) -> Tensor:
        own = self.evaluate.once(x, t, self.evaluate.w)
        age = step % self.every
        if age == 0:
            without, conditional = self.evaluate.both(x, t)
            self._error = without + self.evaluate.w * (conditional - without) - own
        return own + (1 - age / self.every) * self._error


class Rising(Rule):
    """CFG with a w − 1 that rises linearly over the steps; the mean over the steps is the nominal w − 1.

    This is the linear scheduler of Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers" (arXiv
    2404.13040), applied to w − 1, so that no step is guided away from the prompt.
    """

    @classmethod
    def evaluations(cls, step: int, every: int | None) -> int:
        return 2

    def share(self, step: int) -> float:
        """Factor of w − 1 in a step; its mean over the steps is 1."""
        return 2 * (step + 0.5) / self.steps

    def __call__(self, step: int, x: Tensor, t: Tensor, signal: float, noise: float) -> Tensor:
        without, conditional = self.evaluate.both(x, t)
        return conditional + (self.evaluate.w - 1) * self.share(step) * (conditional - without)


class Falling(Rising):
    """The same with w − 1 falling linearly: guidance is strongest at first, as in decaying schedules."""

    def share(self, step: int) -> float:
        return 2 * (self.steps - step - 0.5) / self.steps


RULES: dict[str, type[Rule]] = {
    "cached": CachedDifference, "residual": ResidualGuidance, "anchors": Anchors, "rising": Rising, "falling": Falling,
}  # fmt: skip


def evaluations(kind: str, steps: int, every: int | None = None) -> int:
    """Network evaluations per image in a run of ``steps`` steps."""
    return sum(RULES[kind].evaluations(i, every) for i in range(steps))


def most_steps(kind: str, budget: int, every: int | None = None) -> int:
    """The most steps of a rule within ``budget`` evaluations."""
    steps = 0
    while evaluations(kind, steps + 1, every) <= budget:
        steps += 1
    return steps
