"""The CLIP score, computed with a user-supplied CLIP model; none is bundled or downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError, MissingDependency
from .fidelity import check_images

#: pixel normalisation of OpenAI's CLIP, used if the folder has none
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """CLIP score (Hessel et al. 2021, without their factor 2.5): 100 · max(cos(image, prompt), 0).

    Args:
        folder: a folder written by transformers' ``CLIPModel.save_pretrained``, with the tokenizer. Pixels are
            normalised as its ``preprocessor_config.json`` specifies, or as OpenAI's CLIP does if that is missing.

    Raises:
        InputError: if the folder has no CLIP model in safetensors, or no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as e:
            raise MissingDependency(
                "the CLIP score needs transformers; install with: pip install 'pnp-trt[build]'"
            ) from e
        from ...models.networks import quiet_libraries

        quiet_libraries()
        kind = _config(folder / "config.json").get("model_type")
        if kind != "clip":
            raise InputError(
                f"--clip {folder} holds {kind or 'no config.json'}, not a CLIP model; name a folder with one"
            )
        if not list(folder.glob("*.safetensors")):
            raise InputError(f"--clip {folder} holds no .safetensors; save it again with safe_serialization=True")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise InputError(f"--clip {folder} cannot be loaded as a CLIP model with its tokenizer ({e})") from e
        self._model = model.float().eval().requires_grad_(False)
        self._side = int(model.config.vision_config.image_size)
        self._longest = int(model.config.text_config.max_position_embeddings)
        preprocessor = _config(folder / "preprocessor_config.json")
        self._mean, self._std = preprocessor.get("image_mean", _MEAN), preprocessor.get("image_std", _STD)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], batch: int = 16) -> np.ndarray:
        """Return the score of each image with its own prompt, float32 ``[N]``; higher is better.

        Images, uint8 ``[N, H, W, 3]``, are resized (bicubic, antialiased) and cropped to CLIP's square.

        Raises:
            InputError: if the counts differ.
        """
        import torch
        import torch.nn.functional as F

        images = check_images(images)
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} images do not match {len(prompts)} prompts")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self._mean, self._std))
        side, out = self._side, []
        with torch.inference_mode():
            for i in range(0, len(images), batch):
                x = torch.from_numpy(np.ascontiguousarray(images[i : i + batch])).permute(0, 3, 1, 2).float()
                scale = side / min(x.shape[-2:])
                size = [max(round(n * scale), side) for n in x.shape[-2:]]
                x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
                top, left = (size[0] - side) // 2, (size[1] - side) // 2
                x = (x[..., top : top + side, left : left + side] / 255 - mean) / std
                tokens = self._tokenizer(
                    list(prompts[i : i + batch]), padding=True, truncation=True, max_length=self._longest,
                    return_tensors="pt",
                )  # fmt: skip
                output = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=x)
                cosine = F.cosine_similarity(output.image_embeds, output.text_embeds)
                out.append((100 * cosine).clamp(min=0).cpu().numpy())
        return np.concatenate(out).astype(np.float32)


def _config(path: Path) -> dict[str, object]:
    """Return the contents of a JSON file, or an empty dict if it does not exist."""
    try:
        config: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} cannot be read as JSON ({e})") from e
    return config
