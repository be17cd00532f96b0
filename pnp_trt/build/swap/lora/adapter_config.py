"""Read scales from peft's configuration, if any: in a file's metadata, or in ``adapter_config.json`` beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....io.inputs import parse_json
from .names import LoraTarget
from .source import Lora

#: diffusers' key in the metadata of a safetensors file
METADATA_KEY = "lora_adapter_metadata"
#: initialisations that do not change the base's weights; others subtract the factors' product from them
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
#: options with which a layer's change is not scale · B·A
_OTHER_ARITHMETIC = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "arrow_config",
    "kasa_config", "monteclora_config", "target_parameters", "trainable_token_indices", "modules_to_save",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """peft's configuration of one file.

    Attributes:
        where: location, for messages.
        entries: in the form of diffusers, ``{"unet.lora_alpha": 4, …}``, or of peft, ``{"lora_alpha": 4, …}``.
    """

    where: str
    entries: Mapping[str, Any]

    @classmethod
    def read(cls, lora: Lora, metadata: Mapping[str, str]) -> AdapterConfig:
        """Read a file's configuration; empty if it has none.

        Raises:
            InputError: if it cannot be read.
        """
        if METADATA_KEY in metadata:
            where = f"the metadata of {lora.path}"
            return cls(where, _object(where, metadata[METADATA_KEY]))
        if lora.adapter_config is not None:
            return cls(str(lora.adapter_config), _object(str(lora.adapter_config), _text(lora.adapter_config)))
        return cls(str(lora.path), {})

    def factor(self, layer: LoraTarget, rank: int, alpha: float | None) -> float:
        """Multiplier of the product of a layer's factors: alpha/rank, or alpha/√rank for rsLoRA.

        Args:
            rank: rank of the factors.
            alpha: the layer's alpha; None uses the configuration's.  If that has none either, the multiplier is 1.

        Raises:
            InputError: if the configuration requires other arithmetic, or contradicts the factors.
        """
        config = self._of(layer.network)
        self._check_plain(config)
        stated = self._by_pattern(config, "rank_pattern", layer, config.get("r"))
        if stated is not None and stated != rank:
            raise InputError(
                f"{self.where} gives {layer} the rank {stated:g}, but its factors have rank {rank}; save the LoRA again"
            )
        if alpha is None:
            alpha = self._by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _of(self, network: str) -> dict[str, Any]:
        if any(k.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for k in self.entries):
            prefix = f"{network}."
            return {k.removeprefix(prefix): v for k, v in self.entries.items() if k.startswith(prefix)}
        return dict(self.entries)

    def _check_plain(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type") or "LORA"
        odd = [f"{k} = {config[k]!r}" for k in _OTHER_ARITHMETIC if config.get(k)]
        start = config.get("init_lora_weights")
        if str(kind).rpartition(".")[2] != "LORA":
            odd.insert(0, f"peft_type = {kind!r}")
        if start not in _PLAIN_INITIALISATIONS:
            odd.append(f"init_lora_weights = {start!r}")
        if odd:
            raise InputError(
                f"{self.where} states {odd[0]}, which is not a plain LoRA and is not supported; merge it into the "
                "checkpoint with peft, and plug the result with --base"
            )

    def _by_pattern(self, config: Mapping[str, Any], key: str, layer: LoraTarget, default: Any) -> float | None:
        """The value of the first pattern that matches the layer's name, as in peft."""
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise InputError(f"{self.where} has {key} = {patterns!r}, not an object of patterns; save the LoRA again")
        names = {layer.name, f"text_model.{layer.name}"} if layer.network != "unet" else {layer.name}
        for pattern, value in patterns.items():
            if any(self._matches(pattern, name) for name in names):
                return self._number(f"{key}['{pattern}']", value)
        return self._number({"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[key], default)

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error as e:
            raise InputError(f"{self.where} has an invalid pattern '{pattern}': {e}") from None

    def _number(self, key: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"{self.where} has {key} = {value!r}, not a number; save the LoRA again")
        return float(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e}); fetch it again") from None


def _object(where: str, text: str) -> dict[str, Any]:
    config = parse_json(text, f"{where}: the adapter's configuration", "fetch it again")
    if not isinstance(config, dict):
        raise InputError(f"{where}: the adapter's configuration is not a JSON object; fetch it again")
    return config
