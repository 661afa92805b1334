"""Files: written, checked, counted, refused."""

import json

import numpy as np
import pytest
import torch

from pcenet.cli import main
from pcenet.exporting.checks import CheckReport, margin_of, sent_to_one
from pcenet.exporting.files import ExportedNet
from pcenet.inference.network import Network
from pcenet.models import create_network
from pcenet.nn import Grid, PCEConv2d, PCELayer, record_routing
from pcenet.nn.routing import route

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package)
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, its folder and its ONNX file with routing, which takes some seconds to write."""
    from exporting import make_tiny

    folder = tmp_path_factory.mktemp("export")
    model = make_tiny()
    model.grey_range = [0, 4095]
    model.save_pretrained(folder / "model")
    assert main(["export", str(folder / "model"), "--out", str(folder / "net.onnx"), "--routing"]) == 0
    return model, folder


def test_onnxruntime_computes_what_the_network_does(exported):
    model, folder = exported
    images = torch.randn(5, 3, 16, 16)
    session = ort.InferenceSession(str(folder / "net.onnx"))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
    with torch.no_grad(), record_routing(model) as records:
        expected = model(images)
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert len(records) == 2
    for layer, (routing,) in records.items():
        assert found[f"expert:{layer}"].shape == routing.grid
        np.testing.assert_array_equal(found[f"expert:{layer}"].ravel(), routing.expert_ids[:, 0])
        np.testing.assert_allclose(found[f"gate:{layer}"].ravel(), routing.gates[:, 0], rtol=1e-5)


def test_the_file_carries_what_is_needed_to_use_it(exported):
    model, folder = exported
    carried = json.loads(ort.InferenceSession(str(folder / "net.onnx")).get_modelmeta().custom_metadata_map["pcenet"])
    assert carried["class_names"] == ["a", "b", "c"]
    assert carried["task"] == "classify"
    assert ExportedNet(folder / "net.onnx").grey_range == carried["grey_range"] == [0, 4095]
    assert carried["input_size"] == [3, 16, 16]
    assert carried["preprocessing"]["mean"] == list(model.pretrained_cfg["mean"])
    assert {"pcenet", "torch", "onnx"} <= carried["versions"].keys()


def test_the_graph_does_the_work_of_one_expert_for_each_patch(exported):
    from pcenet.exporting.multiply_adds import count_multiply_adds

    _, folder = exported
    counts = [
        count_multiply_adds(
            folder / "net.onnx", torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (0, 1)
    ]
    assert counts[0] == counts[1]  # whoever the experts are
    stem, down = 64 * 9 * 3 * 8, 16 * 4 * 8 * 16
    assert counts[0].by_operator["Conv"] == stem + down
    # Maps of 8 x 8 in 8 channels, 4 tiles of 4 x 4 by Winograd; of 4 x 4 in 16 channels, a product for each pixel.
    winograd = 2 * 4 * (36 * 36 * 8 + 36 * 8 * 8 + 16 * 36 * 8)
    router = 64 * 8 * 16 + 4 * 16 * 2
    products = 2 * 16 * 9 * 16 * 16
    router_of_pixels = 16 * 16 * 16 + 16 * 16 * 2
    classifier = 16 * 3
    assert counts[0].total == stem + down + winograd + router + products + router_of_pixels + classifier


@pytest.mark.slow
def test_the_file_for_one_image_multiplies_few_patches_pixel_by_pixel(exported, tmp_path):
    from pcenet.exporting.multiply_adds import count_multiply_adds

    model, folder = exported
    path = tmp_path / "one.onnx"
    assert main(["export", str(folder / "model"), "--out", str(path), "--dynamic", "none"]) == 0
    counts = count_multiply_adds(path, torch.randn(1, 3, 16, 16))
    # As above, but for the first layer: its 64 pixels read 9 of 8 channels each.
    first, second = 2 * 64 * 9 * 8 * 8, 2 * 16 * 9 * 16 * 16
    routers = 64 * 8 * 16 + 4 * 16 * 2 + 16 * 16 * 16 + 16 * 16 * 2
    assert counts.total == counts.by_operator["Conv"] + first + second + routers + 16 * 3
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ExportedNet(path)(images), model(images), rtol=1e-4, atol=1e-5)


def test_predict_takes_the_file(exported, tmp_path):
    from PIL import Image

    _, folder = exported
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    results = []
    for name in ("model", "net.onnx"):
        out = tmp_path / name
        arguments = [str(folder / name), str(tmp_path / "red.png"), "--out", str(out), "--precision", "fp32"]
        assert main(["predict", *arguments]) == 0
        results.append(json.loads((out / "predictions.json").read_text())["predictions"][0])
    assert results[0]["label"] == results[1]["label"]
    assert results[0]["probability"] == pytest.approx(results[1]["probability"], abs=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_network_of_ones_own(tmp_path, dynamic):
    from pcenet.exporting.onnx_writing import export_onnx

    torch.manual_seed(0)
    layers = PCELayer(8, 8, patch_size=2, num_experts=3), PCEConv2d(8, 5, patch_size=4)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), *layers).eval()
    images = torch.randn(3, 4, 8, 8)
    export_onnx(network, images[:1], tmp_path / "own.onnx", output_names=["map"], dynamic_batch=dynamic)
    session = ort.InferenceSession(str(tmp_path / "own.onnx"))
    assert [output.name for output in session.get_outputs()] == ["map"]
    given = images if dynamic else images[:1]
    (found,) = session.run(None, {"images": given.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(given), rtol=1e-4, atol=1e-5)


def test_a_file_is_predicted_in_float32_whatever_the_precision():
    """It was exported for that; autocast would change types within a program."""

    class Program(ExportedNet):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def forward(self, images):
            product = images.flatten(1) @ torch.ones(images[0].numel(), 3)
            assert product.dtype == torch.float32
            return product

    network = Network(Program(), ["a", "b", "c"], False, torch.device("cpu"), "bf16")
    logits, _ = network(torch.full((2, 3, 4, 4), 1.001))
    torch.testing.assert_close(logits, torch.full((2, 3), 48.048))


def test_the_file_is_not_overwritten(exported, capsys):
    _, folder = exported
    content = (folder / "net.onnx").read_bytes()
    assert main(["export", str(folder / "model"), "--out", str(folder / "net.onnx")]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert (folder / "net.onnx").read_bytes() == content


def test_a_file_that_computes_something_else_is_deleted(exported, tmp_path, capsys, monkeypatch):
    from pcenet.exporting import command

    _, folder = exported

    def write(self, path):
        content = (folder / "net.onnx").read_bytes()
        path.write_bytes(content)
        # The network beside it is another one.
        with torch.no_grad():
            self.model.head.fc.bias[1] += 0.01

    monkeypatch.setattr(command.Subject, "write", write)
    assert main(["export", str(folder / "model"), "--routing", "--out", str(tmp_path / "wrong.onnx")]) == 2
    error = capsys.readouterr().err
    assert "written and deleted: its output is not the network's: as routed, batch of 1 at 16x16, image 0" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dynamic", "prepared"), [("batch", (32, 48)), ("batch,size", (64, 48))])
def test_a_file_that_segments_takes_pictures_of_any_shape(tmp_path, dynamic, prepared):
    from PIL import Image

    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 48)}
    model = create_network("dense_unet_nano", num_classes=3, pretrained_cfg_overlay=overlay).eval()
    model.class_names, model.mask_values, model.ignored_values = ["a", "b", "c"], [7, 0, 9], [255]
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "net.onnx"
    assert main(["export", str(tmp_path / "model"), "--dynamic", dynamic, "--out", str(file)]) == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "tall.png")
    Image.fromarray(noise[:20]).save(pictures / "wide.png")
    assert main(["predict", str(file), str(pictures), "--out", str(tmp_path / "out"), "--precision", "fp32"]) == 0
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    # 48 pixels wide, it is 57.6 high: 58, and 64 where sides are multiples of 32 or 16.
    resized = Image.fromarray(noise).resize(prepared[::-1], Image.Resampling.BILINEAR)
    images = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(images[None]), (60, 50), mode="bilinear")
    masks = {path.stem: np.array(Image.open(path)) for path in (tmp_path / "out").rglob("*.png")}
    (tall,), (wide,) = ([mask for name, mask in masks.items() if name.startswith(key)] for key in ("tall", "wide"))
    assert tall.shape == (60, 50)
    assert wide.shape == (20, 50)
    assert (tall == np.array(model.mask_values)[logits[0].argmax(0).numpy()]).mean() > 0.999


def test_a_program_of_open_sizes_has_no_pce_layers(exported, tmp_path, capsys):
    _, folder = exported
    options = ["--format", "pt2", "--dynamic", "batch,size", "--out", str(tmp_path / "net.pt2")]
    assert main(["export", str(folder / "model"), *options]) == 2
    assert "dynamic: the size cannot be open in a program (pt2) with PCE layers" in capsys.readouterr().err
    model = create_network("dense_nano", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 16, 16)}).eval()
    model.save_pretrained(tmp_path / "dense")
    assert main(["export", str(tmp_path / "dense"), *options]) == 0
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        found, expected = ExportedNet(tmp_path / "net.pt2", trust_code=True)(images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_refused(exported):
    _, folder = exported
    with pytest.raises(ValueError, match="takes images of 16 x 16 px, not 16 x 20"):
        ExportedNet(folder / "net.onnx")(torch.zeros(1, 3, 16, 20))


def test_what_is_no_export_of_ours_is_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="onnxruntime cannot read it"):
        ExportedNet(tmp_path / "broken.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dynamic", "height"], "dynamic 'height': 'height' is none of batch, size"),
        (["--format", "tflite"], "format 'tflite' is not one of onnx, pt2"),
        (["--out", "net.bin"], "net.bin must end in .onnx"),
    ],
)
def test_options_are_checked(exported, capsys, arguments, message):
    _, folder = exported
    assert main(["export", str(folder / "model"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_all_patches_can_be_sent_to_one_expert(exported):
    model, _ = exported
    for expert, number in ((0, 0), (-1, 1)):
        with torch.no_grad(), record_routing(sent_to_one(model, expert)) as records:
            sent_to_one(model, expert)
            forced = sent_to_one(model, expert)
            with record_routing(forced) as own:
                forced(torch.randn(2, 3, 16, 16))
        assert not records
        assert all((routing.expert_ids == number).all() for (routing,) in own.values())


def test_margins():
    logits = torch.tensor([[1.0, 3.0, 2.5], [0.0, 0.0, 5.0]])
    for top_k, expected in ((1, [0.5, 5.0]), (2, [1.5, 0.0]), (3, [torch.inf, torch.inf])):
        torch.testing.assert_close(margin_of(route(logits, Grid(1, 1, 2), top_k=top_k)), torch.tensor(expected))


def test_differences_are_judged_by_margins():
    report = CheckReport()
    expected = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = torch.tensor([[1.00005, 0.0], [0.0, 1.0], [1.0, 0.0]])
    margins = torch.ones(3, 1000)
    margins[1, 7] = 1e-5
    report.compare("case", expected, found, margins)
    assert (report.samples, report.patches, report.small_margins) == (3, 3000, 1)
    assert report.unsure == report.excused == ["case, image 1"]
    assert report.verdict is None
    assert report.largest_difference == pytest.approx(5e-5, rel=1e-2)
    report.compare("case", expected[1:2], found[1:2], torch.ones(1, 1000))
    assert report.verdict is not None
    assert "case, image 0: a logit differs by 1" in report.verdict


def test_many_unsure_patches_fail():
    report = CheckReport()
    logits = torch.zeros(1, 2)
    report.compare("case", logits, logits, torch.full((1, 10), 1e-6))
    assert report.verdict is not None
    assert "10 of 10 patches" in report.verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["--format", "pt2"], (16, 16)),
        (["--dynamic", "batch,size"], (32, 16)),
        (["--dynamic", "none", "--format", "pt2"], (16, 16)),
    ],
    ids=str,
)
def test_other_kinds_of_file(exported, tmp_path, arguments, size):
    model, folder = exported
    path = tmp_path / f"net.{'pt2' if 'pt2' in arguments else 'onnx'}"
    assert main(["export", str(folder / "model"), *arguments, "--out", str(path)]) == 0
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(
            ExportedNet(path, trust_code=path.suffix == ".pt2")(images), model(images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("pce_nano", {"border": "halo", "top_k": 2, "num_experts": 3}, 17),
        ("pce_nano", {"border": "zero", "gate_input": "flat", "patch_sizes": (3, 1)}, 16),
        ("pce_unet_nano", {}, 16),
        ("unet:pce_nano_s2", {"strides": (2, 4)}, 16),
    ],
    ids=str,
)
def test_other_networks(tmp_path, name, changes, size):
    from exporting import make_tiny

    model = make_tiny(name, **changes)
    model.pretrained_cfg["input_size"] = (3, size, size)
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "net.onnx")]) == 0
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ExportedNet(tmp_path / "net.onnx")(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_upcycled_network_is_exported(tmp_path):
    from exporting import trained_like

    torch.manual_seed(0)
    model = create_network("timm:resnet10t", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    model.upcycle(num_experts=2, layers=1.0)
    trained_like(model).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "net.onnx")]) == 0


@pytest.mark.slow
def test_int8_says_what_it_costs(exported, tmp_path, capsys, caplog):
    import onnx
    from PIL import Image

    _, folder = exported
    for split in ("train", "val"):
        for number, (name, colour) in enumerate({"a": "red", "b": "green", "c": "blue"}.items()):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for copy in range(3):
                image = Image.new("RGB", (16, 16), colour)
                image.putpixel((number, copy), (255, 255, 255))
                image.save(tmp_path / "data" / split / name / f"{copy}.png")
    arguments = ["--int8", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "net.onnx")]
    assert main(["export", str(folder / "model"), *arguments]) == 0
    assert "before" in capsys.readouterr().out
    assert "pre-processing" not in caplog.text
    net = ExportedNet(tmp_path / "net.onnx")
    assert net.metadata["int8"].keys() == {"data", "split", "score", "before", "after"}
    assert 0 <= net.metadata["int8"]["after"] <= 1
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    quantised = [
        tuple(each.dims)
        for each in onnx.load(tmp_path / "net.onnx").graph.initializer
        if each.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and len(each.dims) == 2
    ]
    # Two kernels of two experts in the second layer, whose patches are one pixel, and the classifier; no router.
    assert sorted(quantised) == [(16, 3)] + [(9 * 16, 16)] * 4
    assert not list(tmp_path.glob("*.int8.onnx"))


def test_int8_asks_for_data(exported, capsys):
    _, folder = exported
    assert main(["export", str(folder / "model"), "--int8"]) == 2
    assert "give --data SOURCE" in capsys.readouterr().err
