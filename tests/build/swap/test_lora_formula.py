"""Merged weights are W + Σ scale · alpha/rank · B·A, worked out by numpy in float64 from the factors as stored."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pnp_trt.build.swap.lora import LayerNames, Lora, LoraWeights, architecture, load, merge
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve

from .lora_files import FORMATS, TEXT, TYPES, UNET, Pair, network_of, numbers, write

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
CONV, PROJ = "down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1"


class Networks:
    """The micro teacher's U-Net and text encoder, and the shapes of their weights by layer."""

    def __init__(self, folder: Path) -> None:
        base = resolve(str(folder))
        self.modules = {"unet": base.unet(), "text_encoder": base.text_encoder()}
        self.names = LayerNames(self.modules)
        self.shapes = {layer: self.weight(layer).shape for layer in (*UNET, *TEXT, NORM)}

    def key(self, layer: str, name: str = "weight") -> str:
        text = layer in TEXT and hasattr(self.modules["text_encoder"], "text_model")
        return f"{'text_model.' if text else ''}{layer}.{name}"

    def weight(self, layer: str, name: str = "weight") -> torch.Tensor:
        return self.modules[network_of(layer)].state_dict()[self.key(layer, name)]

    def load(self, path: Path, scale: float = 1.0) -> LoraWeights:
        return load(Lora.parse(f"{path}:{scale}"), self.names)

    def merged(self, loras: list[LoraWeights], stored: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
        """State dicts by network after a merge into weights that are stored in a type."""
        modules = {n: copy.deepcopy(m).to(stored) for n, m in self.modules.items()}
        return {n: merge(m, n, loras).state_dict() for n, m in modules.items()}

    def check(
        self, loras: list[LoraWeights], added: dict[str, np.ndarray], stored: torch.dtype = torch.float32,
        biases: dict[str, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Hold a merge against W + what should be added; every other weight is as before, bit by bit."""
        after = self.merged(loras, stored)
        right = {self.key(layer): (network_of(layer), delta) for layer, delta in added.items()}
        right |= {self.key(layer, "bias"): (network_of(layer), delta) for layer, delta in (biases or {}).items()}
        for network, state in after.items():
            for key, value in state.items():
                before = self.modules[network].state_dict()[key].to(stored)
                if right.get(key, ("", 0))[0] != network:
                    assert torch.equal(value, before), key
                    continue
                wanted = numbers(before) + right[key][1]
                error = np.abs(numbers(value) - wanted).max() / np.abs(wanted).max()
                assert error < 1e-6, f"{key}: {error:.1e}"


@pytest.fixture(scope="module")
def networks(micro_base: Path) -> Networks:
    return Networks(micro_base)


ALPHAS = st.none() | st.just(0.0) | st.floats(-32, 32, width=32)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A LoRA file's layers with ranks and alphas of their own, its format, the type of its factors, and a scale."""
    layers = draw(st.lists(st.sampled_from([*UNET, *TEXT]), min_size=1, max_size=6, unique=True))
    return {
        "form": draw(st.sampled_from(FORMATS)),
        "pairs": [Pair(layer, draw(st.integers(1, 9)), draw(ALPHAS)) for layer in layers],
        "dtype": draw(st.sampled_from(list(TYPES))),
        "as_matrices": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "scale": draw(st.sampled_from([1.0, 0.0, -1.0]) | st.floats(-2, 2)),
    }


@settings(max_examples=60, deadline=None)
@given(specs=st.lists(files(), min_size=1, max_size=3), stored=st.sampled_from(list(TYPES)))
def test_every_layer_has_its_own_rank_and_alpha(networks: Networks, specs: list[dict[str, Any]], stored: str) -> None:
    loras, added = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i, spec in enumerate(specs):
            path, scale = Path(folder) / f"{i}.safetensors", spec.pop("scale")
            for layer, change in write(path, shapes=networks.shapes, **spec).items():
                added[layer] = added.get(layer, 0.0) + scale * change
            loras.append(networks.load(path, scale))
        networks.check(loras, added, TYPES[stored])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_names_every_layer(networks: Networks, tmp_path: Path, form: str) -> None:
    pairs = [Pair(layer, 1 + i % 4, None if i % 3 == 0 else i / 2) for i, layer in enumerate([*UNET, *TEXT])]
    added = write(tmp_path / "x.safetensors", form, pairs, networks.shapes)
    lora = networks.load(tmp_path / "x.safetensors", 0.7)
    assert {n for c in lora.changes.values() for n in c} == {networks.key(p.layer, "")[:-1] for p in pairs}
    networks.check([lora], {layer: 0.7 * change for layer, change in added.items()})


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_attention_processors_of_old_diffusers(networks: Networks, tmp_path: Path, prefix: str) -> None:
    pairs = [Pair(Q, 4, None), Pair(K, 2, None), Pair(OUT, 3, None), Pair(TEXT[0], 2, None), Pair(TEXT[1], 5, None)]
    added = write(tmp_path / "new.safetensors", "diffusers", pairs, networks.shapes)
    old = {
        key.replace(".attn1.to_q.", ".attn1.processor.to_q_lora.")
        .replace(".attn2.to_k.", ".attn2.processor.to_k_lora.")
        .replace(".attn2.to_out.0.", ".attn2.processor.to_out_lora.").replace(".q_proj.", ".to_q_lora.")
        .replace(".out_proj.", ".to_out_lora.").replace("lora_A.", "down.").replace("lora_B.", "up.")
        .replace("unet.", prefix): tensor
        for key, tensor in load_file(tmp_path / "new.safetensors").items()
    }  # fmt: skip
    assert f"{prefix}{OUT.replace('.to_out.0', '.processor.to_out_lora')}.up.weight" in old
    save_file(old, tmp_path / "old.safetensors")
    networks.check([networks.load(tmp_path / "old.safetensors")], added)


def test_original_names_are_those_of_diffusers_converter(networks: Networks) -> None:
    """Second opinion: diffusers' own conversion of checkpoints puts each original name where ours states it is."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = networks.modules["unet"]
    layers = [n for n, m in unet.named_modules() if "weight" in m._parameters]
    inner = {n.partition(".attentions.")[2].partition(".")[2] for n in layers if ".attentions." in n}
    inner |= {"op", "conv", "skip_connection", "emb_layers.1"} | {
        f"{s}_layers.{i}" for s in ("in", "out") for i in (0, 2, 3)
    }
    places = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(9) for j in range(3)]
    places += [f"middle_block.{i}" for i in range(3)]
    candidates = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "out.0", "out.2"]
    candidates += [f"{a}.{b}" for a, b in itertools.product(places, inner)]
    original = {name: layer for name in candidates if (layer := networks.names.find(name, "unet"))}
    assert {layer.name for layer in original.values()} == set(layers) and len(original) == len(layers)
    checkpoint = {
        f"model.diffusion_model.{name}.{part}": torch.full((1,), i)
        for i, name in enumerate(original) for part in ("weight", "bias")
    }  # fmt: skip
    converted = convert_ldm_unet_checkpoint(checkpoint, config=dict(unet.config))
    for i, layer in enumerate(original.values()):
        assert int(converted[f"{layer.name}.weight"]) == i, layer.name


def test_a_bundles_configs_name_the_layers_of_its_networks(networks: Networks, micro_bundles: Path) -> None:
    names = architecture(open_bundle(micro_bundles / "guided").manifest.configs or {})
    for network, module in networks.modules.items():
        for name, part in module.named_modules():
            if "weight" in part._parameters:
                layer = names.find(name, network)
                assert layer is not None and layer == networks.names.find(name, network)
                assert (layer.name, layer.shape) == (name, tuple(part.weight.shape))


def unet_pairs(tmp_path: Path, networks: Networks, metadata: dict[str, Any]) -> tuple[Path, dict[str, np.ndarray]]:
    """A file of ranks 4, 9 and 4, without alphas but for its metadata."""
    path = tmp_path / "x.safetensors"
    pairs = [Pair(Q, 4, None), Pair(K, 9, None), Pair(TEXT[0], 4, None)]
    return path, write(path, "diffusers", pairs, networks.shapes, metadata=metadata)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", [K, "attn2.to_k", "mid_block.*to_k", "to_k"])
def test_metadata_has_patterns_and_rslora(networks: Networks, tmp_path: Path, pattern: str, rslora: bool) -> None:
    metadata = {"unet.r": 4, "unet.lora_alpha": 16, "unet.rank_pattern": {pattern: 9},
                "unet.alpha_pattern": {pattern: 5}, "unet.use_rslora": rslora, "unet.init_lora_weights": True,
                "text_encoder.r": 4, "text_encoder.lora_alpha": 3}  # fmt: skip
    path, added = unet_pairs(tmp_path, networks, metadata)
    added[Q] = added[Q] * 16 / (2 if rslora else 4)
    added[K] = added[K] * 5 / (3 if rslora else 9)
    added[TEXT[0]] = added[TEXT[0]] * 3 / 4
    networks.check([networks.load(path)], added)


def test_scales_by_metadata_are_pefts(networks: Networks, tmp_path: Path) -> None:
    """Second opinion: peft, given the same configuration and factors."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    options: dict[str, Any] = {
        "r": 4, "lora_alpha": 3, "rank_pattern": {"attn2.to_k": 9}, "alpha_pattern": {"attn2.to_k": 2}
    }  # fmt: skip
    pairs = [Pair(Q, 4, None), Pair(K, 9, None)]
    for i, rslora in enumerate((False, True)):
        path = tmp_path / f"{i}.safetensors"
        config = options | {"use_rslora": rslora}
        write(path, "no-prefix", pairs, networks.shapes, metadata=config)
        theirs = inject_adapter_in_model(
            LoraConfig(target_modules=[Q, K], **config), copy.deepcopy(networks.modules["unet"])
        )
        set_peft_model_state_dict(theirs, load_file(path))
        ours = networks.merged([networks.load(path, 0.5)])["unet"]
        for layer in (Q, K):
            part = theirs.get_submodule(layer)
            wanted = part.base_layer.weight + 0.5 * part.get_delta_weight("default")
            torch.testing.assert_close(ours[f"{layer}.weight"], wanted.detach(), rtol=1e-5, atol=1e-6)


def test_pefts_own_folder_has_its_scale_in_a_file_of_its_own(networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    added = write(path, "peft", [Pair(Q, 4, None)], networks.shapes)
    networks.check([networks.load(path)], added)
    without = Lora.parse(str(path)).identity()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12, "peft_type": "LORA"}))
    networks.check([networks.load(path)], {Q: 3 * added[Q]})
    assert Lora.parse(str(path)).identity() != without
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config.json: the adapter's configuration is not complete JSON"):
        networks.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"unet.r": 8}, r"gives unet\.\S+ the rank 8, but its factors have rank 4"),
        ({"unet.use_dora": True}, "states use_dora = True, which is not a plain LoRA"),
        ({"unet.peft_type": "ADALORA"}, "states peft_type = 'ADALORA'"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "states init_lora_weights = 'pissa_niter_4'"),
        ({"unet.lora_alpha": "four"}, "has lora_alpha = 'four', not a number"),
        ({"unet.alpha_pattern": {"(": 3}}, r"has an invalid pattern '\('"),
        ({"unet.alpha_pattern": [3]}, r"has alpha_pattern = \[3\], not an object"),
    ],
)
def test_metadata_that_cannot_be_followed(
    networks: Networks, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path, _ = unet_pairs(tmp_path, networks, metadata)
    with pytest.raises(InputError, match=message):
        networks.load(path)


def rng_tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).normal(0, 0.1, shape)).float()


def kohya(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


def test_a_tucker_convolution_is_three_convolutions(networks: Networks, tmp_path: Path) -> None:
    """Applied one after the other, 1×1, 3×3 and 1×1, they are the convolution that is added."""
    outputs, inputs, *_ = networks.shapes[CONV]
    down, mid, up = rng_tensor(4, inputs, 1, 1), rng_tensor(4, 4, 3, 3), rng_tensor(outputs, 4, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{kohya(CONV)}.{k}": v for k, v in parts.items()}, tmp_path / "x.safetensors")
    after = networks.merged([networks.load(tmp_path / "x.safetensors", 0.5)])["unet"][f"{CONV}.weight"]
    x, conv = rng_tensor(1, inputs, 8, 8).double(), torch.nn.functional.conv2d
    one = conv(x, after.double(), padding=1)
    steps = conv(conv(conv(x, down.double()), mid.double(), padding=1), up.double())
    other = conv(x, networks.weight(CONV).double(), padding=1) + 0.5 * 2 / 4 * steps
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_full_differences_norms_and_biases_are_added(networks: Networks, tmp_path: Path) -> None:
    conv, norm, bias = rng_tensor(*networks.shapes[CONV]), rng_tensor(32), rng_tensor(32)
    conv_bias = rng_tensor(networks.shapes[CONV][0])
    a, b = rng_tensor(4, 32), rng_tensor(32, 4)
    tensors = {
        f"{kohya(CONV)}.diff": conv, f"{kohya(CONV)}.diff_b": conv_bias,
        f"{kohya(NORM)}.w_norm": norm, f"{kohya(NORM)}.b_norm": bias,
        f"unet.{OUT}.lora_A.weight": a, f"unet.{OUT}.lora_B.weight": b, f"unet.{OUT}.lora_B.bias": bias.clone(),
        f"unet.{OUT}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    networks.check(
        [networks.load(tmp_path / "x.safetensors", -0.3)],
        {CONV: -0.3 * numbers(conv), NORM: -0.3 * numbers(norm), OUT: -0.15 * numbers(b) @ numbers(a)},
        biases={CONV: -0.3 * numbers(conv_bias), NORM: -0.3 * numbers(bias), OUT: -0.15 * numbers(bias)},
    )


def test_a_table_of_embeddings_is_changed_by_the_transpose(networks: Networks, tmp_path: Path) -> None:
    """peft's ``lora_embedding_A`` is ``[rank, entries]``."""
    text = networks.modules["text_encoder"]
    name = next(n for n, m in text.named_modules() if n.endswith("position_embedding"))
    table = text.get_submodule(name).weight
    a, b = rng_tensor(4, table.shape[0]), rng_tensor(table.shape[1], 4)
    save_file(
        {f"text_encoder.{name}.lora_embedding_A": a, f"text_encoder.{name}.lora_embedding_B": b},
        tmp_path / "x.safetensors",
    )
    after = networks.merged([networks.load(tmp_path / "x.safetensors")])["text_encoder"]
    wanted = numbers(table.detach()) + (numbers(b) @ numbers(a)).T
    np.testing.assert_allclose(numbers(after[f"{name}.weight"]), wanted, rtol=1e-6, atol=1e-6)


KINDS = {
    "LoHa": {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4), "hada_w2_b": (4, 32)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
    "DoRA": {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": (32, 1)},
    "OFT or BOFT": {"oft_blocks": (4, 8, 8)},
    "BOFT": {"boft_R": (1, 4, 8, 8), "boft_s": (32, 1)},
    "IA3": {"weight": (32,), "on_input": (1,)},
    "GLoRA": {"a1.weight": (4, 32), "a2.weight": (32, 4), "b1.weight": (4, 32), "b2.weight": (32, 4)},
    "AdaLoRA": {"lora_A": (4, 32), "lora_B": (32, 4), "lora_E": (4, 1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name_with_the_way_out(networks: Networks, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "kohya", [Pair(K, 4, 2.0)], networks.shapes)
    other = {f"{kohya(Q)}.{part}": rng_tensor(*shape) for part, shape in KINDS[kind].items()}
    save_file(load_file(path) | other, path)
    with pytest.raises(InputError, match=f"is of the kind {kind} .* merge it into the checkpoint with the tool it was"):
        networks.load(path)


KEY = f"{kohya(Q)}.lora_down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: torch.zeros(4, 48)}, r"is for another unet: \S+ has shape \[4, 48\], and the weight of"),
        ({KEY: torch.zeros(5, 32)}, r"lora_up.weight has shape \[32, 4\], .*\(rank 5\)"),
        ({KEY: torch.zeros(0, 32)}, "has rank 0"),
        ({KEY: torch.zeros(())}, r"rank 0|has shape \[\]"),
        ({KEY: torch.full((4, 32), float("nan"))}, "holds values that are not finite"),
        ({KEY: torch.full((4, 32), float("-inf")).half()}, "holds values that are not finite"),
        ({KEY: torch.zeros(4, 32, dtype=torch.int8)}, "has the type int8; weights must be float32, float16"),
        ({KEY: torch.zeros(4, 32).double()}, "has the type float64"),
        ({KEY: torch.zeros(4, 32).to(torch.float8_e4m3fn)}, "has the type float8_e4m3fn"),
        ({KEY: torch.zeros(4, 32, dtype=torch.complex64)}, "has the type complex64"),
        ({f"{kohya(Q)}.alpha": torch.tensor(float("nan"))}, "alpha is nan, not a finite number"),
        ({f"{kohya(Q)}.alpha": torch.ones(2)}, r"alpha is \[1.0, 1.0\], not a finite number"),
        ({KEY: None}, r"is incomplete: \S+ has no lora_down \(A\) for unet.down_blocks"),
        ({KEY.replace("down.weight", "up.weight"): None}, r"is incomplete: \S+ has no lora_up \(B\)"),
        ({KEY: None, KEY.replace("down.weight", "up.weight"): None}, r"has no lora_down \(A\) and lora_up \(B\)"),
        ({f"unet.{Q}.lora_A.weight": torch.zeros(4, 32)}, "has two keys for the same weights"),
        ({f"{kohya(Q)}.diff": torch.zeros(32, 32)}, "has both low-rank factors and a full difference"),
        ({f"{kohya(Q)}.diff_b": torch.zeros(32)}, r"\.diff_b changes a bias \(diff_b\), and unet\.\S+ has none"),
        ({"lora_unet_nowhere.lora_down.weight": torch.zeros(4, 32)}, "has 1 of 4 keys that match no layer"),
        ({f"{kohya(Q)}.odd": torch.zeros(1)}, r"match no layer of the engine's model: \S+to_q.odd"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 32)}, "is for SDXL"),
        ({"lora_unet_label_emb_0_0.lora_down.weight": torch.zeros(4, 32)}, "it looks like a LoRA for SDXL"),
        ({"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.tensor(1.0)}, "it looks like a LoRA for Flux"),
        ({"bundle_emb.x.string_to_param.*": torch.zeros(2, 32)}, "contains a textual-inversion embedding"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_whole(
    networks: Networks, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "kohya", [Pair(Q, 4, 2.0)], networks.shapes)
    tensors = load_file(path) | change
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    with pytest.raises(InputError, match=message):
        networks.load(path)


def test_a_checkpoint_is_not_a_lora(networks: Networks, tuned_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a LoRA: none of its \d+ keys .* give a checkpoint with --base"):
        networks.load(tuned_unet)
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no weights"):
        networks.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x3C20])
def test_headers_whose_length_reads_like_another_format(networks: Networks, tmp_path: Path, length: int) -> None:
    """A safetensors file begins with its header's length: 640 looks like a pickle, 15392 like a web page."""
    path = tmp_path / "x.safetensors"
    added = write(path, "kohya", [Pair(Q, 4, 2.0)], networks.shapes)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(load_file(path), path, {"ss_tag": "x" * (length - size - len('"__metadata__":{"ss_tag":""},'))})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    networks.check([networks.load(path)], added)


def test_a_change_that_leaves_float32_is_refused(networks: Networks, tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "kohya", [Pair(Q, 4, 1e36)], networks.shapes)
    with pytest.raises(InputError, match=r"the weight of unet\.\S+ reaches .* too large for float32; use smaller"):
        networks.merged([networks.load(tmp_path / "x.safetensors", 1e5)])


def in_graph_order(array: np.ndarray, transform: list[dict[str, Any]]) -> np.ndarray:
    """numpy's version of the layout steps; the cast is what is tested."""
    for step in transform:
        if step["op"] == "transpose":
            array = array.transpose(step["perm"])
        elif step["op"] == "reshape":
            array = array.reshape(step["shape"])
        else:
            assert step["op"] == "cast", step
    return array


@pytest.mark.parametrize(("engine", "stored"), [("fp32", "float16"), ("fp16", "bfloat16")])
def test_the_engines_own_file_has_the_formulas_weights(
    networks: Networks, tuned_unet: Path, micro_base: Path, request: pytest.FixtureRequest, tmp_path: Path, engine: str,
    stored: str,
) -> None:  # fmt: skip
    """Two LoRAs with alphas by layer, into a checkpoint stored in half precision; rounded to the engine's type once."""
    source = request.getfixturevalue("half_bundle") if engine == "fp16" else None
    source = source or request.getfixturevalue("micro_bundles") / "guided"
    unet = {k: v.to(TYPES[stored]) for k, v in load_file(tuned_unet).items()}
    save_file(unet, tmp_path / "base.safetensors")
    text = networks.modules["text_encoder"].state_dict()
    right = {
        "unet": {k: numbers(v) for k, v in unet.items()},
        "text_encoder": {k: numbers(v) for k, v in text.items()},
    }
    loras = []
    for seed, scale in ((1, 0.1), (2, -0.5)):
        pairs = [Pair(n, 1 + (i + seed) % 5, [None, 0.0, 0.5, 4.0][i % 4]) for i, n in enumerate([*UNET, *TEXT])]
        path = tmp_path / f"{seed}.safetensors"
        for layer, change in write(path, "kohya", pairs, networks.shapes, dtype="float16", seed=seed).items():
            right[network_of(layer)][networks.key(layer)] += scale * change
        loras.append(f"{path}:{scale}")
    made = plug(PlugSpec(str(source), str(tmp_path / "base.safetensors"), tuple(loras), tmp_path / "out"))
    maps = json.loads((made.folder / "weights.json").read_text())["networks"]
    for network in ("unet", "text_encoder"):
        values = ir.load(made.folder / made.manifest.networks[network].graph).graph.initializers
        for name, w in maps[network]["weights"].items():
            if w["source"] == network:
                got = values[name].const_value.numpy()
                wanted = in_graph_order(right[network][w["key"]], w["transform"])
                half_a_step = np.spacing(np.abs(wanted.astype(got.dtype))).astype(np.float64) / 2
                assert (np.abs(got - wanted) <= half_a_step * 1.001 + 1e-7 * np.abs(wanted)).all(), name
