"""The recipe's stages; each reads the files that earlier ones wrote to ``context.out``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from . import autoencoder, text, train
from .data import BASE_STYLES, FINE_TUNE_STYLES, Images, Style, images, split
from .presets import Preset

#: the U-Net's latents are the autoencoder's times this factor; the decoder applies tanh(z / 3) to its input, so the
#: autoencoder's latents must be small
SCALING_FACTOR = 2.5


@dataclass
class Context:
    """Folders of the recipe, and what its stages share."""

    preset: Preset
    out: Path
    cache: Path
    assets: Path

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.preset.seed)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def images(self, styles: tuple[Style, ...]) -> Images:
        return images(styles, split()["train"], self.cache, self.preset.variants)

    @cached_property
    def tokenizer(self):
        from transformers import CLIPTokenizer

        folder = self.out / "tokenizer"
        if not (folder / "vocab.json").exists():
            text.write_tokenizer(folder, self.cache)
        return CLIPTokenizer.from_pretrained(folder)

    def vae(self) -> nn.Module:
        """The autoencoder with its closed-form encoder and an untrained decoder."""
        weight, bias = autoencoder.principal_code(self.images(BASE_STYLES).pixels, self.preset.latent_channels)
        vae = autoencoder.build(weight / SCALING_FACTOR, bias / SCALING_FACTOR)
        vae.register_to_config(scaling_factor=SCALING_FACTOR)
        return vae

    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(self.preset.seed)
        p = self.preset
        return UNet2DConditionModel(
            sample_size=16, in_channels=p.latent_channels, out_channels=p.latent_channels,
            block_out_channels=p.block_out_channels, layers_per_block=p.layers_per_block,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=p.text_width, attention_head_dim=4, norm_num_groups=16,
        )  # fmt: skip

    def text_encoder(self) -> nn.Module:
        _ = self.tokenizer
        torch.manual_seed(self.preset.seed)
        return text.text_encoder(
            text.token_table(self.out / "tokenizer", self.preset.text_width, self.cache), self.preset.text_layers
        )

    def latents(self, shots: Images) -> torch.Tensor:
        return (autoencoder.encode(self.vae(), shots.pixels) * SCALING_FACTOR).to(self.device)


class Model(nn.Module):
    """U-Net and text encoder trained together."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


PREVIEW = (
    "red apple",
    "grinning face",
    "red heart",
    "panda",
    "rocket",
    "house",
    "pizza",
    "fish",
    "tulip",
    "automobile",
)


def previewer(context: Context, model: Model, styles: tuple[str, ...], path: Path):
    """Return a function that writes a small grid, decoded by the patch code's linear inverse without a decoder."""
    from PIL import Image

    from .data import caption

    shots = images(BASE_STYLES, split()["train"], context.cache, context.preset.variants)
    weight, bias = autoencoder.principal_code(shots.pixels, context.preset.latent_channels)
    inverse = torch.linalg.pinv(weight.flatten(1))
    abar = train.alphas_cumprod()

    def preview(step: int) -> None:
        texts = [caption(c, s) for s in styles for c in PREVIEW]
        both = ["", *texts]
        ids = context.tokenizer(
            both, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = model.text_encoder(ids.to(context.device))[0]
        c, u = states[1:], states[:1].expand(len(texts), -1, -1)
        x = torch.randn(
            len(texts), context.preset.latent_channels, 16, 16, generator=torch.Generator().manual_seed(1)
        ).to(context.device)
        times = list(range(999, 0, -40))
        for i, t in enumerate(times):
            e_u, e_c = model.unet(torch.cat([x, x]), torch.tensor(t), torch.cat([u, c])).sample.chunk(2)
            e = e_u + 3.0 * (e_c - e_u)
            a, b = abar[t], abar[times[i + 1]] if i + 1 < len(times) else abar[0]
            x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        z = x.cpu().permute(0, 2, 3, 1) - bias
        patches = (z @ inverse.T).reshape(len(texts), 16, 16, 3, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(-1, 64, 64, 3)
        rows = patches.clamp(0, 1).mul(255).byte().reshape(len(styles), len(PREVIEW), 64, 64, 3).permute(0, 2, 1, 3, 4)
        Image.fromarray(rows.reshape(64 * len(styles), 64 * len(PREVIEW), 3).numpy()).save(
            path.with_name(f"{path.name}-{step:06d}.png")
        )

    return preview


def stage_text(context: Context) -> None:
    """Write the tokenizer and compute the token table."""
    context.text_encoder()


def stage_base(context: Context) -> None:
    """Train the base U-Net and text encoder on the two base styles."""
    final = context.out / "base.safetensors"
    if final.exists():
        return
    shots = context.images(BASE_STYLES)
    model = Model(context.unet(), context.text_encoder()).to(context.device)
    loss = train.denoising_loss(
        model.unet, model.text_encoder, context.tokenizer, context.latents(shots), shots.concepts, shots.styles,
        context.preset, "base", jittered_until=round(context.preset.jittered * context.preset.steps),
    )  # fmt: skip
    show = previewer(context, model, tuple(s.word for s in BASE_STYLES), context.out / "base")
    ema = train.run_loop(
        "base", model, loss, context.preset.steps, context.preset.lr, context.preset, context.out, show
    )
    _save_final(model, ema, final)


def stage_decoder(context: Context) -> None:
    """Train the autoencoder's decoder on all four styles."""
    final = context.out / "vae.safetensors"
    if final.exists():
        return
    shots = images((*BASE_STYLES, *FINE_TUNE_STYLES), split()["train"], context.cache, 2)
    vae = context.vae().to(context.device)
    latents = autoencoder.encode(vae.cpu(), shots.pixels)
    vae.to(context.device)
    loss = train.decoder_loss(vae, torch.from_numpy(shots.pixels), latents, context.preset)
    ema = train.run_loop("decoder", vae, loss, context.preset.decoder_steps, 1e-3, context.preset, context.out)
    _save_final(vae, ema, final)


def stage_fine_tunes(context: Context) -> None:
    """Fine-tune the base U-Net on each fine-tune style; the text encoder is frozen."""
    from safetensors.torch import load_file

    for style in FINE_TUNE_STYLES:
        final = context.out / f"fine-tune-{style.word}.safetensors"
        if final.exists():
            continue
        shots = context.images((style,))
        model = Model(context.unet(), context.text_encoder())
        model.load_state_dict(load_file(context.out / "base.safetensors"))
        model.text_encoder.requires_grad_(False)
        model.to(context.device)
        name = f"fine-tune-{style.word}"
        loss = train.denoising_loss(
            model.unet,
            model.text_encoder,
            context.tokenizer,
            context.latents(shots),
            shots.concepts,
            shots.styles,
            context.preset,
            name,
        )
        p = context.preset
        show = previewer(context, model, (style.word,), context.out / name)
        ema = train.run_loop(name, model, loss, p.fine_tune_steps, p.fine_tune_lr, p, context.out, show)
        _save_final(model.unet, ema, final, prefix="unet.")


def write_pipeline(context: Context, unet: nn.Module, text_encoder: nn.Module, vae: nn.Module, folder: Path) -> None:
    """Write the diffusers ``StableDiffusionPipeline`` folder, with weights in float16 safetensors."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        unet=unet.half(), text_encoder=text_encoder.half(), vae=vae.half(), tokenizer=context.tokenizer,
        scheduler=DDIMScheduler(**train.scheduler_config()), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    # current transformers writes only tokenizer.json; other readers of the format need these two files
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(context.out / "tokenizer" / name, folder / "tokenizer" / name)
    _compute_in_float32(folder / "text_encoder" / "config.json")


def _compute_in_float32(path: Path) -> None:
    """Make transformers convert the stored float16 weights to float32 if no type is requested.

    diffusers does so for the U-Net and the VAE, and a text encoder in float16 does not run with them.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the entry's name in earlier versions of transformers
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_final(module: nn.Module, ema: train.Ema, path: Path, prefix: str = "") -> None:
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    state.update({k.removeprefix(prefix): v.cpu().contiguous() for k, v in ema.shadow.items()})
    partial = path.with_suffix(".part")
    save_file(state, partial)
    partial.replace(path)


def stage_package(context: Context) -> None:
    """Write the shipped files: the pipeline folder and the fine-tuned U-Nets, in float16 safetensors."""
    from safetensors.torch import load_file, save_file

    model = Model(context.unet(), context.text_encoder())
    model.load_state_dict(load_file(context.out / "base.safetensors"))
    vae = context.vae()
    vae.load_state_dict(load_file(context.out / "vae.safetensors"))
    write_pipeline(context, model.unet, model.text_encoder, vae, context.assets / "emoji")
    for style in FINE_TUNE_STYLES:
        weights = load_file(context.out / f"fine-tune-{style.word}.safetensors")
        target = context.assets / "fine-tunes" / f"emoji-{style.word}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half() for k, v in weights.items()}, target, metadata={"base": "emoji", "style": style.word})


def stage_guide(context: Context) -> None:
    """Train the bundled tiny guides with the commands that users run: stage 1, and stage 2 for few steps."""
    first, second = context.out / "guide", context.out / "guide-steps"
    distill = [sys.executable, "-m", "pnp_trt", "distill"]
    prompts = ["--prompts", "calibration/emoji-prompts.txt"]
    common = ["--base", "emoji", *prompts, "--resume"]
    subprocess.run([*distill, "guidance", *common, "--out", str(first), *context.preset.guide_options], check=True)
    subprocess.run(
        [*distill, "steps", *common, "--guide", str(first), "--out", str(second), *context.preset.steps_options],
        check=True,
    )
    sources = {"emoji-tiny": first} | {f"emoji-tiny-{p.name[6:]}": p for p in sorted(second.glob("steps-*"))}
    for guide, source in sources.items():
        target = context.assets / "guides" / guide
        target.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "diffusion_pytorch_model.safetensors", "distill.json"):
            shutil.copyfile(source / name, target / name)


def stage_judge(context: Context) -> None:
    """Train the alignment head that measures the figures."""
    from .judge import train_judge

    train_judge(context.cache, context.assets / "judge.safetensors")


def stage_figures(context: Context) -> None:
    """Measure figures over w, and write the image grid and the model card."""
    from .card import write_card
    from .figures import evaluate

    tunes = {s.word: context.assets / "fine-tunes" / f"emoji-{s.word}.safetensors" for s in FINE_TUNE_STYLES}
    results = Path("benchmarks/results/emoji-figures.json")
    document = evaluate(
        context.assets / "emoji", tunes, context.assets / "judge.safetensors", context.cache, results, images=384
    )
    write_card(document, context.assets / "emoji" / "README.md")


STAGES = {
    "text": stage_text,
    "base": stage_base,
    "decoder": stage_decoder,
    "fine-tunes": stage_fine_tunes,
    "package": stage_package,
    "guide": stage_guide,
    "judge": stage_judge,
    "figures": stage_figures,
}
