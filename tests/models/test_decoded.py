"""segmentation-models-pytorch's decoders on our encoders."""

from __future__ import annotations

import json
import sys

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F

import pcenet
from pcenet.models import create_network, load_model, model_options, task_of, twin_of
from pcenet.models.decoded import DECODERS, DecodedNet
from pcenet.nn import PCELayer, record_routing

# Every decoder, and each kind of encoder: first map at stride 2, 1 and 4.
NETWORKS = [f"{decoder}:pce_nano_s2" for decoder in DECODERS] + [
    "unet:dense_nano_s2",
    "unet:pce_nano",
    "linknet:pce_nano",
    "unet:pce_tiny",
    "unetplusplus:pce_tiny",
    "segformer:pce_tiny",
    "upernet:pce_tiny",
]
# What segmentation-models-pytorch calls the widths.
WIDTHS = {
    "fpn": ("decoder_pyramid_channels", "decoder_segmentation_channels"),
    "pspnet": ("psp_out_channels",),
    "segformer": ("decoder_segmentation_channels",),
}


def create(name: str, **kwargs: object) -> DecodedNet:
    torch.manual_seed(0)
    return DecodedNet(name, **kwargs)


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_pixels_get_logits_and_every_parameter_a_gradient(name):
    model = create(name, num_classes=5).train()
    with record_routing(model) as records:
        logits = model(images(45, 70))
    assert logits.shape == (2, 5, 45, 70)
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PCELayer)}
    assert records.keys() == layers.keys()
    assert bool(layers) == ("pce" in name)
    for layer_name, layer in layers.items():
        gradient = layer.experts.norm2.bias.grad.abs().sum(1)
        assert torch.equal(gradient > 0, records[layer_name][0].dispatched_counts > 0), layer_name


@pytest.mark.parametrize("name", NETWORKS)
def test_decoders_are_wired_as_in_their_own_models(name, monkeypatch):
    decoder, _, encoder = name.partition(":")
    ours = create(name, num_classes=5).eval()
    strides, widths = ours.model_args["strides"], ours.model_args["decoder_widths"]
    arguments: dict[str, object] = {"feature_cls": "getter", "encoder_depth": strides[-1].bit_length() - 1}
    if decoder in ("unet", "unetplusplus", "manet"):
        arguments["decoder_channels"] = widths
    elif decoder == "linknet":
        # Its last width is fixed there.
        ours = create(name, num_classes=5, decoder_widths=[32]).eval()
    else:
        arguments |= dict.fromkeys(WIDTHS.get(decoder, ("decoder_channels",)), widths[0])
        arguments["upsampling"] = 1
    if decoder == "pan":
        arguments["encoder_output_stride"] = 32
    if decoder.startswith("deeplab"):
        # There it asks the encoder for that stride, which has no such option: it has that stride.
        arguments["encoder_output_stride"] = strides[-1]
        get_encoder = smp.encoders.get_encoder
        monkeypatch.setattr(
            smp.decoders.deeplabv3.model, "get_encoder", lambda *a, output_stride, **k: get_encoder(*a, **k)
        )
    theirs = smp.create_model(decoder, f"tu-{encoder}", encoder_weights=None, classes=5, **arguments).eval()
    weights = {}
    for key, value in ours.state_dict().items():
        part, _, rest = key.partition(".")
        weights[{"encoder": "encoder.model.model.", "head": "segmentation_head."}.get(part, "decoder.") + rest] = value
    theirs.load_state_dict(weights)
    x = images(64, 128)
    with torch.no_grad():
        expected = F.interpolate(theirs(x), size=(64, 128), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize(
    ("name", "size", "padded"),
    [
        ("unet:pce_nano_s2", (45, 70), (48, 72)),
        ("fpn:pce_nano_s2", (1, 8), (8, 8)),
        ("unet:pce_nano", (45, 70), (48, 72)),
        # Its coarsest map is halved three times: 8 cells of 8 px.
        ("pan:pce_nano_s2", (45, 70), (64, 72)),
    ],
)
def test_images_are_padded_with_zeros_at_the_bottom_and_right(name, size, padded):
    model = create(name).eval()
    x = images(*size)
    whole = torch.zeros(2, 3, *padded)
    whole[:, :, : size[0], : size[1]] = x
    with torch.no_grad():
        assert torch.equal(model(x), model(whole)[:, :, : size[0], : size[1]])


def test_initial_weights_depend_on_the_seed_alone():
    first, second = create("unet:pce_nano_s2"), create("unet:pce_nano_s2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_options_reach_the_encoder():
    options = {"num_experts": 2, "top_k": 2, "border": "halo", "capacity_factor": None}
    model = create("unet:pce_nano_s2", in_chans=1, drop_path_rate=0.25, **options)
    layers = [m for m in model.modules() if isinstance(m, PCELayer)]
    assert [layer.extractor.patch_size for layer in layers] == [32, 8, 4]
    assert {(layer.router.num_experts, layer.router.top_k, layer.router.capacity_factor) for layer in layers} == {
        (2, 2, None)
    }
    assert model.encoder.stages[-1][-1].drop_path.drop_prob == 0.25
    assert model.eval()(images(16, 16)[:, :1]).shape == (2, 11, 16, 16)


def test_the_registry_makes_them():
    name = "unet:pce_nano_s2"
    assert (task_of(name), twin_of(name), twin_of("unet:dense_nano_s2")) == ("segment", "unet:dense_nano_s2", None)
    model = create_network(name, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    assert isinstance(model, DecodedNet)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    given = {option: model.model_args.get(option) for option in model_options(name)}
    assert create_network(name, **given).model_args == model.model_args


@pytest.mark.parametrize("name", ["unet:dense_nano_s2", "fpn:dense_nano_s2", "deeplabv3:dense_nano_s2"])
def test_dropout_acts_in_training_and_is_the_only_one(name):
    x = images(32, 32)
    model = create(name, drop_rate=0.5)
    assert torch.equal(model.eval()(x), create(name).eval()(x))
    assert not torch.equal(model.train()(x), model.train()(x))
    plain = create(name).train()
    assert torch.equal(plain(x), plain(x))


def test_stacked_normalisations_are_not_decayed():
    model = create("unet:pce_nano_s2")
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() == {n for n in names if ".experts.norm" in n}
    assert len(model.no_weight_decay()) == 3 * 2 * 2  # layers, normalisations, weight and bias


def test_a_trained_classifier_becomes_the_encoder():
    classifier = timm.create_model("pce_nano_s2", num_classes=3)
    model = create("unet:pce_nano_s2")
    assert model.encoder.load_state_dict(classifier.state_dict(), strict=False).missing_keys == []
    assert torch.equal(model.encoder.stem[0][0].weight, classifier.stem[0][0].weight)


def test_cost_of_the_decoder_by_hand():
    model = create("unet:pce_nano_s2", num_classes=11)
    # 24x32, 48x64, 96x128 cells at strides 8, 4, 2; each level enlarges what lies below it, appends the encoder's map,
    # and convolves twice; the last convolution is 3x3 too.
    quarter, half, full = 48 * 64, 96 * 128, 192 * 256
    decoder = quarter * ((96 + 48) * 24 + 24 * 24) + half * ((24 + 24) * 16 + 16 * 16) + full * (16 * 8 + 8 * 8)
    size = (3, 192, 256)
    encoder = pcenet.complexity(model.encoder, size)
    assert pcenet.complexity(model, size).multiply_adds - encoder.multiply_adds == 9 * (decoder + full * 8 * 11)
    assert 9 * (decoder + full * 8 * 11) < encoder.multiply_adds


@pytest.mark.parametrize("name", ["unet:pce_nano_s2", "unet:pce_tiny_s2", "segformer:pce_nano_s2"])
def test_twins_cost_the_same(name):
    cost = pcenet.complexity(create(name), (3, 192, 256))
    twin = pcenet.complexity(create(name.replace("pce_", "dense_")), (3, 192, 256))
    assert cost.multiply_adds - cost.router_multiply_adds == pytest.approx(twin.multiply_adds, rel=0.01)
    assert cost.router_share < 0.06
    assert twin.router_multiply_adds == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet:pce_nano_s2", {"decoder_widths": (16, 12, 8), "num_experts": 2, "capacity_factor": None}),
        ("upernet:dense_nano_s2", {"drop_rate": 0.1, "widths": (8, 16, 32)}),
    ],
)
def test_round_trip(name, options, tmp_path):
    model = create(name, num_classes=3, **options).eval()
    model.class_names = ["leaf", "pavement", "sky"]
    with torch.no_grad():  # statistics that are not those of a new network
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    x = images(40, 36)
    for loaded in (load_model(tmp_path), DecodedNet.from_pretrained(tmp_path)):
        assert isinstance(loaded, DecodedNet)
        assert loaded.class_names == ["leaf", "pavement", "sky"]
        assert loaded.model_args == model.model_args
        assert (loaded.task, loaded.pretrained_cfg) == ("segment", model.pretrained_cfg)
        assert torch.equal(loaded(x), model(x))


def test_overrides_and_broken_folders(tmp_path):
    model = create("unet:pce_nano_s2", num_classes=3).eval()
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, border="zero").model_args["border"] == "zero"
    with pytest.raises(ValueError, match=r"head\.0\.bias has shape \(3,\), expected \(5,\)"):
        load_model(tmp_path, num_classes=5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "unet:resnet18"}))
    with pytest.raises(ValueError, match="encoder 'resnet18' is unknown"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("unet:resnet18", {}, ValueError, r"encoder 'resnet18' is unknown; take one of dense_nano, .*pce_tiny_s2"),
        ("unet:", {}, ValueError, "encoder '' is unknown"),
        ("dpt:pce_nano_s2", {}, ValueError, "decoder 'dpt' is unknown; take one of unet, unetplusplus, "),
        ("fpn:pce_nano", {}, ValueError, r"does not go with strides \(1, 2, 4\); take one of unet, .*, pspnet$"),
        ("deeplabv3plus:pce_tiny", {}, ValueError, r"does not go with strides \(4, 8, 16, 32\); take one of unet, "),
        ("unet:pce_nano_s2", {"strides": (2, 4, 4)}, ValueError, r"strides=\(2, 4, 4\): decoders need strides that"),
        ("unet:pce_nano_s2", {"strides": (8, 16, 32)}, ValueError, r"strides=\(8, 16, 32\): .* double from 1, 2 or 4"),
        ("unet:pce_nano_s2", {"decoder_widths": (8, 8)}, ValueError, r"decoder_widths=\[8, 8\]: unet takes 3 on"),
        (
            "unet:pce_nano_s2",
            {"decoder_widths": (8, 0, 8)},
            ValueError,
            r"decoder_widths=\[8, 0, 8\]: .* unet must be positive$",
        ),
        ("fpn:pce_nano_s2", {"decoder_widths": (48,)}, ValueError, "those of fpn must be positive multiples of 32"),
        ("unet:pce_nano_s2", {"experts": 3}, TypeError, r"encoder pce_nano_s2 got unexpected arguments \['experts'\]"),
        ("unet:pce_nano_s2", {"global_pool": "max"}, TypeError, r"unexpected arguments \['global_pool'\]"),
        ("unet:dense_nano_s2", {"num_experts": 3}, ValueError, "num_experts: no effect on a dense network"),
    ],
)
def test_wrong_names_and_options(name, options, error, message):
    with pytest.raises(error, match=message):
        DecodedNet(name, **options)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pcenet\[segment\]'"):
        DecodedNet("unet:pce_nano_s2")
