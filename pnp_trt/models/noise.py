"""Prediction type and noise schedule as stated by a user or a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..sampling.noise_levels import PREDICTIONS

#: terms of ModelSpec and of trainers for prediction types → diffusers' terms
_WORDS = {
    "epsilon": "epsilon", "eps": "epsilon", "e": "epsilon", "noise": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "v_pred": "v_prediction",
    "velocity": "v_prediction", "sample": "sample", "x0": "sample", "x": "sample",
}  # fmt: skip


#: metadata whose value is a prediction type
_NAMED = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")


_VELOCITY = ("ss_v_parameterization", "v_parameterization")


_ZERO_SNR = ("ss_zero_terminal_snr", "zero_terminal_snr", "modelspec.zero_terminal_snr")


@dataclass(frozen=True)
class Noise:
    """A U-Net's prediction type and terminal SNR as stated by a user or a file; None if not stated.

    Attributes:
        prediction_type: ``epsilon``, ``v_prediction``, or another term of diffusers.
        zero_terminal_snr: whether the last training timestep is pure noise (Lin et al. 2023).
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None

    def check(self) -> None:
        """Raise ``InputError`` if no schedule supports the prediction type."""
        if self.prediction_type is not None and self.prediction_type not in PREDICTIONS:
            raise InputError(f"--prediction-type is '{self.prediction_type}'; known: {', '.join(PREDICTIONS)}")

    @classmethod
    def stated(cls, markers: Collection[str], metadata: Mapping[str, str], name: str) -> Noise:
        """Read a checkpoint's marker keys (``v_pred``, ``ztsnr``) and safetensors metadata.

        Args:
            markers: the marker keys in the file.
            metadata: the file's metadata, of which the entries of ModelSpec and kohya are read.
            name: name of the file, for messages.

        Raises:
            InputError: if two entries contradict each other, or one cannot be interpreted.
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
        """The equivalent command-line options."""
        words = ["--prediction-type", self.prediction_type] if self.prediction_type is not None else []
        if self.zero_terminal_snr is not None:
            words.append("--zero-terminal-snr" if self.zero_terminal_snr else "--no-zero-terminal-snr")
        return words

    def over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a scheduler config with the stated values set."""
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
        conflict = " and ".join(f"{value} by {key}" for key, value in statements.items())
        raise InputError(f"{name} contradicts itself about its {what}: {conflict}; correct the file's metadata")
    return next(iter(statements.values()), None)
