"""The prediction type and noise schedule that a user or a file states."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..sampling.noise_levels import PREDICTIONS

#: words of ModelSpec and of trainers for what a network predicts
_WORDS = {
    "epsilon": "epsilon", "eps": "epsilon", "e": "epsilon", "noise": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "v_pred": "v_prediction",
    "velocity": "v_prediction", "sample": "sample", "x0": "sample", "x": "sample",
}  # fmt: skip


#: metadata that names the prediction type, and metadata that is true or false about it
_NAMED = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")


_VELOCITY = ("ss_v_parameterization", "v_parameterization")


_ZERO_SNR = ("ss_zero_terminal_snr", "zero_terminal_snr", "modelspec.zero_terminal_snr")


@dataclass(frozen=True)
class Noise:
    """What a user or a file states about a U-Net's noise; None where nothing is said.

    Attributes:
        prediction_type: ``epsilon``, ``v_prediction``, or another word of diffusers.
        zero_terminal_snr: whether the last training timestep is pure noise (Lin et al. 2023).
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None

    def check(self) -> None:
        """Raise ``InputError`` if the prediction type is one that no schedule samples with."""
        if self.prediction_type is not None and self.prediction_type not in PREDICTIONS:
            raise InputError(f"--prediction-type is '{self.prediction_type}'; known: {', '.join(PREDICTIONS)}")

    @classmethod
    def stated(cls, markers: Collection[str], metadata: Mapping[str, str], name: str) -> Noise:
        """What a checkpoint states by marker keys (``v_pred``, ``ztsnr``) and safetensors metadata.

        Args:
            markers: those of its keys.
            metadata: ModelSpec's and kohya's entries are read, the rest is ignored.
            name: of the file, for messages.

        Raises:
            InputError: if two statements contradict each other, or one is not understood.
        """
        predictions = {"its key v_pred": "v_prediction"} if "v_pred" in markers else {}
        for key in _NAMED:
            if (value := _word(metadata, key)) is not None:
                predictions[key] = _WORDS.get(value, value)
        for key in _VELOCITY:
            if (flag := _flag(metadata, key, name)) is not None:
                predictions[key] = "v_prediction" if flag else "epsilon"
        zeros = {"its key ztsnr": True} if "ztsnr" in markers else {}
        for key in _ZERO_SNR:
            if (flag := _flag(metadata, key, name)) is not None:
                zeros[key] = flag
        return cls(_agreed(predictions, name, "prediction type"), _agreed(zeros, name, "zero terminal SNR"))

    def arguments(self) -> list[str]:
        """As options of the command line."""
        words = ["--prediction-type", self.prediction_type] if self.prediction_type is not None else []
        if self.zero_terminal_snr is not None:
            words.append("--zero-terminal-snr" if self.zero_terminal_snr else "--no-zero-terminal-snr")
        return words

    def over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler config with what is said here put in its place."""
        out = dict(config)
        if self.prediction_type is not None:
            out["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr is not None:
            out["rescale_betas_zero_snr"] = self.zero_terminal_snr
        return out


def _word(metadata: Mapping[str, str], key: str) -> str | None:
    value = metadata.get(key, "").strip().lower()
    return value if value not in ("", "none", "null") else None


def _flag(metadata: Mapping[str, str], key: str, name: str) -> bool | None:
    value = _word(metadata, key)
    if value not in (None, "true", "false", "1", "0", "yes", "no"):
        raise InputError(f"{name}: its metadata {key} is '{metadata[key]}'; it must be True or False")
    return None if value is None else value in ("true", "1", "yes")


def _agreed(statements: Mapping[str, Any], name: str, what: str) -> Any:
    if len(set(statements.values())) > 1:
        said = " and ".join(f"{value} by {key}" for key, value in statements.items())
        raise InputError(f"{name} contradicts itself about its {what}: {said}; correct the file's metadata")
    return next(iter(statements.values()), None)
