"""The tiny guide: our own design within the paper's budget, as the paper does not publish its tiny guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...errors import InputError
from .base import Guide
from .parts import Features, GainTable, GuideInput, GuideOutput, signature, sinusoid
from .sharpener import Sharpener

READS = ("features", "latent")
EMITS = ("all", "deep", "mid")
TRUNKS = ("conv", "depthwise", "attention")


class SkipAdapter(nn.Module):
    """The weights of a low-rank, spatially aware residual for one feature map; initially zero.

    ``C → rank`` (1×1), plus the shared context, modulated by (t, w), a depthwise 3×3, ``rank → C`` (1×1, no
    bias, zero-initialised).  :func:`adapt` computes the residuals of all feature maps of one size at once.

    Args:
        channels: channels of the feature map.
        rank: inner channels.
        reads: whether it uses the feature map itself, or only the context.
        norm: whether to normalise the feature map first: skips are residual streams of very different magnitude.
    """

    def __init__(self, channels: int, rank: int, reads: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels) if norm and reads else None
        self.reduce = nn.Conv2d(channels, rank, 1) if reads else None
        self.mix = nn.Conv2d(rank, rank, 3, padding=1, groups=rank)
        self.expand = nn.Conv2d(rank, channels, 1, bias=False)
        nn.init.zeros_(self.expand.weight)

    def reduced(self, x: Tensor) -> Tensor:
        """The feature map projected to the inner channels, ``[B, rank, H, W]``."""
        assert self.reduce is not None
        out: Tensor = self.reduce(x if self.norm is None else self.norm(x))
        return out


#: a scale and a shift, ``[B, K · rank, 1, 1]`` each
Film = tuple[Tensor, Tensor]


def adapt(
    adapters: Sequence[SkipAdapter], maps: Sequence[Tensor], context: Tensor, film: Film, gate: Tensor
) -> list[Tensor]:
    """Compute the residuals of K feature maps of one size, with the maps' shapes.

    The inner channels of all K maps form one tensor between the first and the last projection.  This suits runtimes
    that fuse little, where the number of small operations determines the time; a compiler that fuses a map's modulation
    into its projection needs fewer kernels with one map at a time.  The gate is applied before the last projection,
    where there are fewer channels.

    Args:
        adapters: one adapter per map.
        maps: the feature maps, ``[B, C_k, H, W]``.
        context: the shared context, ``[B, rank, H, W]``.
        film: scale and shift of all K maps.
        gate: factor of the residuals, ``[B, 1, 1, 1]``.
    """
    count, rank = len(adapters), context.shape[1]
    if count == 1:
        ((adapter, x),) = zip(adapters, maps, strict=True)
        h = context if adapter.reduce is None else adapter.reduced(x) + context
        h = F.silu(h * film[0] + film[1])
        return [adapter.expand(F.silu(adapter.mix(h)) * gate)]
    h = context[:, None].expand(-1, count, -1, -1, -1)
    if adapters[0].reduce is not None:
        reduced = torch.cat([a.reduced(x) for a, x in zip(adapters, maps, strict=True)], 1)
        h = reduced.unflatten(1, (count, rank)) + context[:, None]
    h = F.silu(h.flatten(1, 2) * film[0] + film[1])
    weight, bias = (torch.cat([getattr(a.mix, name) for a in adapters]) for name in ("weight", "bias"))
    h = F.silu(F.conv2d(h, weight, bias, padding=1, groups=count * rank)) * gate
    return [a.expand(part) for a, part in zip(adapters, h.chunk(count, 1), strict=True)]


class TrunkBlock(nn.Module):
    """A residual pair of convolutions (3×3, or depthwise 3×3 and 1×1) modulated by (t, w)."""

    def __init__(self, width: int, depthwise: bool = False) -> None:
        super().__init__()
        if depthwise:
            self.first: nn.Module = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.second: nn.Module = nn.Conv2d(width, width, 1)
        else:
            self.first = nn.Conv2d(width, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x * scale + shift))))


class AttentionBlock(nn.Module):
    """Residual attention of the trunk's positions to each other or to text states; initially zero."""

    def __init__(self, width: int, source: int | None = None) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(source or width, width)
        self.v = nn.Linear(source or width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)
        attended = positions if source is None else source
        # one head: the width is that of a single head of the usual U-Nets
        h = F.scaled_dot_product_attention(
            self.q(positions)[:, None], self.k(attended)[:, None], self.v(attended)[:, None]
        )[:, 0]
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[-2:])


class LatentStem(nn.Module):
    """Convolutions from the noisy latent to the mid block's resolution, for guides that do not use features."""

    def __init__(self, channels: int, width: int, halvings: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(halvings))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for conv in self.down:
            x = conv(F.silu(x))
        return x


class TinyGuide(Guide):
    """The tiny guide: one low-rank adapter per skip, which reads the teacher's own encoder features.

    It uses the frozen encoder's skips and mid-block output instead of the raw latent.  These features already contain
    the teacher's representation of the latent and the text, and those of a fine-tuned teacher represent its domain.  A
    trunk of a few blocks reads the deepest features, which depend on all of the text, at their low resolution, where
    arithmetic is cheap; all adapters share its output.  The residuals are multiplied by (w − 1) and are therefore
    exactly zero at w = 1, where guidance is the conditional prediction itself.

    The options after ``trunk_blocks`` are the designs that were compared (docs/ablation.md); the defaults are the best.

    Args:
        skip_channels: channels of each skip, shallow to deep.
        mid_channels: channels of the mid block's output.
        cross_attention_dim: width of the text states.
        in_channels: channels of the latent.
        rank: inner channels of trunk and adapters.
        embed_dim: width of the (t, w) embedding.
        trunk_blocks: residual blocks of the trunk.
        trunk_kind: ``conv`` (3×3 pairs), ``depthwise`` (3×3 depthwise, 1×1), or ``attention`` (``conv``, and after each
            block attention of the positions to each other).
        reads: ``features`` of the teacher's encoder, or only the ``latent``.
        emits: residuals for ``all`` skips and mid, for the ``deep`` skips (at the mid block's resolution) and mid, or
            only for the ``mid`` block.
        text: whether the trunk also attends to the prompt's text states itself.
        negative_prompts: whether the trunk attends to a negative prompt's text states, so that it supports negative
            prompts.
        norm: whether features are normalised first.
        skip_halvings: number of times that each skip's resolution is halved; None if it is not needed.
        sampling_steps: the only number of sampling steps that it was distilled for (stage 2); None for any.
        gain: factors of the residuals at equally spaced timesteps (``parts.GainTable``); None for no factor.
        sharpener_width: inner width of its sharpener of text states (``sharpener.Sharpener``), the other way to support
            negative prompts; None for no sharpener.
    """

    # constant_parts stays empty: w enters only a small embedding, together with the timestep
    size_options: ClassVar[tuple[str, ...]] = (
        "rank", "embed_dim", "trunk_blocks", "trunk_kind", "reads", "emits", "text", "negative_prompts", "norm",
        "sharpener_width",
    )  # fmt: skip

    @register_to_config
    def __init__(
        self,
        skip_channels: tuple[int, ...],
        mid_channels: int,
        cross_attention_dim: int,
        in_channels: int = 4,
        rank: int = 48,
        embed_dim: int = 64,
        trunk_blocks: int = 3,
        trunk_kind: str = "depthwise",
        reads: str = "features",
        emits: str = "all",
        text: bool = False,
        negative_prompts: bool = False,
        norm: bool = False,
        skip_halvings: tuple[int, ...] | None = None,
        sampling_steps: int | None = None,
        gain: tuple[float, ...] | None = None,
        sharpener_width: int | None = None,
    ) -> None:
        super().__init__()
        if negative_prompts and sharpener_width is not None:
            raise InputError("a tiny guide supports negative prompts by negative_prompts or by a sharpener; choose one")
        for name, value, known in (
            ("trunk_kind", trunk_kind, TRUNKS),
            ("reads", reads, READS),
            ("emits", emits, EMITS),
        ):
            if value not in known:
                raise InputError(f"the tiny guide's {name} is '{value}'; known: {', '.join(known)}")
        channels = (*skip_channels, mid_channels)
        halvings = skip_halvings or (0,) * len(skip_channels)
        deepest = max(halvings)
        self.emitting = tuple(
            i == len(skip_channels) or emits == "all" or (emits == "deep" and halvings[i] == deepest)
            for i in range(len(channels))
        )
        self.embed = nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        sees_features = reads == "features"
        self.pool = nn.Linear(mid_channels if sees_features else cross_attention_dim, embed_dim)
        self.stem = None if sees_features else LatentStem(in_channels, rank, deepest)
        deep = skip_channels[-1] + mid_channels
        self.context_norm = nn.GroupNorm(1, deep) if norm and sees_features else None
        self.context = nn.Conv2d(deep, rank, 1) if sees_features else None
        self.trunk = nn.ModuleList(TrunkBlock(rank, trunk_kind == "depthwise") for _ in range(trunk_blocks))
        self.attention = nn.ModuleList(
            AttentionBlock(rank) for _ in range(trunk_blocks if trunk_kind == "attention" else 0)
        )
        self.text_attention = AttentionBlock(rank, cross_attention_dim) if text else None
        self.negative_attention = AttentionBlock(rank, cross_attention_dim) if negative_prompts else None
        emitted = [c for c, used in zip(channels, self.emitting, strict=True) if used]
        self.adapters = nn.ModuleList(SkipAdapter(c, rank, sees_features, norm) for c in emitted)
        self.film = nn.Linear(embed_dim, 2 * rank * (len(self.trunk) + len(self.adapters)))
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        if gain is not None:
            self.gain_table = GainTable(gain)
        if sharpener_width is not None:
            self.sharpener = Sharpener(cross_attention_dim, sharpener_width)

    @classmethod
    def from_unet(cls, unet: Any, **options: Any) -> TinyGuide:
        """Create a guide that fits ``unet``; its residuals are zero until it is trained.

        Args:
            unet: a ``UNet2DConditionModel``.
            options: ``rank``, ``embed_dim`` and the design options of the class.
        """
        halvings: list[int] = [0]
        for depth, block in enumerate(unet.down_blocks):
            halvings += [depth] * len(block.resnets) + [depth + 1] * (1 if block.downsamplers else 0)
        return cls(**signature(unet), skip_halvings=tuple(halvings), **options)

    def forward(self, inputs: GuideInput) -> GuideOutput:
        """Residuals for one step; see :class:`GuideInput`."""
        emb = self.embedding(inputs.timestep, inputs.guidance, inputs.features.mid_block_res_sample.dtype)
        emb = emb + self.summary(inputs)
        context = self.deep_context(inputs)
        films = self.modulation(emb, [len(maps) for maps in self.groups(inputs.features)])
        context = self.through_trunk(context, films[: len(self.trunk)])
        return self.residuals(inputs, context, films[len(self.trunk) :])

    def embedding(self, timestep: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding of (t, w), ``[B, embed_dim]``."""
        width = self.config.embed_dim
        conditions = [sinusoid(timestep, width, 10_000.0), sinusoid(guidance.float() * 4, width, 100.0)]
        embedded: Tensor = self.embed(torch.cat(conditions, -1).to(dtype))
        return embedded

    def summary(self, inputs: GuideInput) -> Tensor:
        """Pooled features, or pooled text states, to add to the embedding, ``[B, embed_dim]``."""
        if self.stem is None:
            pooled: Tensor = self.pool(inputs.features.mid_block_res_sample.mean((2, 3)))
        else:
            pooled = self.pool(inputs.encoder_hidden_states.mean(1))
        return pooled

    def deep_context(self, inputs: GuideInput) -> Tensor:
        """Input of the trunk, ``[B, rank, H, W]`` at the mid block's resolution."""
        if self.stem is None:
            context: Tensor = self._of_deepest(inputs.features)
        else:
            context = self.stem(inputs.sample)
        if self.text_attention is not None:
            context = self.text_attention(context, inputs.encoder_hidden_states)
        if self.negative_attention is not None:
            context = self.negative_attention(context, inputs.needs_negative())
        return context

    def _of_deepest(self, features: Features) -> Tensor:
        """The deepest skip and the mid block's output, concatenated and projected to ``[B, rank, H, W]``."""
        skip, mid = features.down_block_res_samples[-1], features.mid_block_res_sample
        context = cast(nn.Conv2d, self.context)
        if self.context_norm is not None:
            out: Tensor = context(self.context_norm(torch.cat([skip, mid], 1)))
            return out
        # a sum of two projections, to avoid concatenating the maps
        first = skip.shape[1]
        return F.conv2d(skip, context.weight[:, :first]) + F.conv2d(mid, context.weight[:, first:], context.bias)

    def modulation(self, emb: Tensor, groups: Sequence[int]) -> list[Film]:
        """Scale and shift for each block of the trunk, then for each group of adapters.

        Args:
            emb: ``[B, embed_dim]``.
            groups: number of adapters in each group.
        """
        # scales and shifts alternate in the weights; separated, one addition and one split suffice for all of them
        weight, bias = (
            p.unflatten(0, (-1, 2, self.config.rank)).transpose(0, 1).flatten(0, 2)
            for p in (self.film.weight, self.film.bias)
        )
        scale, shift = F.linear(F.silu(emb), weight, bias)[:, :, None, None].chunk(2, 1)
        widths = [self.config.rank * count for count in (*[1] * len(self.trunk), *groups)]
        return list(zip((1 + scale).split(widths, 1), shift.split(widths, 1), strict=True))

    def through_trunk(self, context: Tensor, films: Sequence[Film]) -> Tensor:
        """Run the trunk: the context that the adapters share, of the same shape; ``films`` are those of the blocks."""
        for i, (block, film) in enumerate(zip(self.trunk, films, strict=True)):
            context = block(context, *film)
            if len(self.attention):
                context = self.attention[i](context)
        return context

    def groups(self, features: Features) -> list[list[Tensor]]:
        """Feature maps that get residuals, in groups: one map each, or neighbours of one size if ``side_by_side``."""
        groups: list[list[Tensor]] = []
        maps = (*features.down_block_res_samples, features.mid_block_res_sample)
        for x in (x for x, used in zip(maps, self.emitting, strict=True) if used):
            # the exporter's symbolic sizes can be compared but not hashed
            if self.side_by_side and groups and groups[-1][0].shape[-2:] == x.shape[-2:]:
                groups[-1].append(x)
            else:
                groups.append([x])
        return groups

    def residuals(self, inputs: GuideInput, context: Tensor, films: Sequence[Film]) -> GuideOutput:
        """Run the adapters; ``films`` are those of their groups."""
        gate = self.gate(inputs, context.dtype)
        adapters = cast(list[SkipAdapter], list(self.adapters))
        outputs: list[Tensor] = []
        resized = context
        for maps, film in zip(self.groups(inputs.features), films, strict=True):
            size = maps[0].shape[-2:]
            if resized.shape[-2:] != size:  # once per size, as maps of one size are neighbours
                resized = context if context.shape[-2:] == size else F.interpolate(context, size=size, mode="nearest")
            outputs += adapt(adapters[len(outputs) : len(outputs) + len(maps)], maps, resized, film, gate)
        rest = iter(outputs)
        residuals = [next(rest) if used else None for used in self.emitting]
        return GuideOutput(tuple(residuals[:-1]), cast(Tensor, residuals[-1]))
