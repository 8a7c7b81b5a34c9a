"""The surrogate against timm's, torchvision's and open_clip's own forward passes and transforms."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import skimage
import timm
import torch
import torchvision
from numpy.typing import NDArray
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ConflictError, InputError, SettingsError
from pipeline.hashing import sha256
from pipeline.surrogates import pretrained
from pipeline.surrogates.surrogate import Surrogate, check_surrogate, load_surrogate
from pipeline.surrogates.towers import clip

EMBEDDED = "timm:tf_efficientnet_lite0"
TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach a network: what is not here cannot be had."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def embedded() -> Surrogate:
    return load_surrogate(EMBEDDED, weights=None, size=None, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    """Photographs of several shapes, one of them smaller than any input."""
    astronaut, cat = skimage.data.astronaut(), skimage.data.chelsea()
    return [astronaut, cat, np.ascontiguousarray(cat[:90, :140]), np.ascontiguousarray(astronaut[:301, :227])]


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Iterator[str]:
    """A CLIP of two layers, known to open_clip under a name of its own."""
    path = tmp_path / "scumble-tiny.json"
    path.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path)
    yield "scumble-tiny"
    open_clip.factory._MODEL_CONFIGS.pop("scumble-tiny")


def through_timm(pictures: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """(prepared inputs before normalisation, features) by timm's own loader, transform and network."""
    path = str(pretrained.EMBEDDED_WEIGHTS)
    network = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=0
    ).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network), is_training=False)
    inputs = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    with torch.inference_mode():
        return inputs * 0.5 + 0.5, network(inputs)


def test_the_embedded_surrogate_knows_its_own_preprocessing(embedded: Surrogate) -> None:
    assert (embedded.mean, embedded.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (embedded.interpolation, embedded.input_size, embedded.resize) == ("bicubic", 224, 256)
    assert embedded.dimension == 1280
    assert json.loads(embedded.id) == {
        "name": EMBEDDED,
        "weights": pretrained.EMBEDDED_SHA256[:16],
        "size": 224,
        "resize": 256,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "squash": False,
    }


@pytest.mark.parametrize("size", [None, 64, 160])
def test_what_is_known_of_the_embedded_surrogate_is_what_its_library_says(size: int | None) -> None:
    tower = pretrained.build_tower(EMBEDDED, weights=None, size=size)
    given = pretrained.build_tower(EMBEDDED, weights=pretrained.EMBEDDED_WEIGHTS, size=size)  # asks the library
    assert tower.preprocessing == given.preprocessing
    assert tower.weights_sha256 == given.weights_sha256
    assert tower.is_convolutional == given.is_convolutional
    for ours, theirs in zip(tower.head or (), given.head or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    picture = torch.zeros(1, 3, tower.preprocessing.size, tower.preprocessing.size)
    with torch.inference_mode():
        features = tower.network(picture)
    torch.testing.assert_close(features, given.network(picture), rtol=0, atol=0)
    assert features.shape == (1, tower.dimension)


def test_the_embedded_surrogate_is_known_without_importing_its_library() -> None:
    code = (
        "import sys; from pipeline.settings import Settings; from pipeline.surrogates.surrogate import known_surrogate;"
        f"known = known_surrogate(Settings(input='a', output='b', surrogate='{EMBEDDED}'));"
        "assert known.dimension == 1280 and known.head is not None and 'timm' not in sys.modules; known.loaded();"
        "assert 'timm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_pictures_are_prepared_as_timm_prepares_them_within_a_grey_level_or_two(
    embedded: Surrogate, pictures: list[NDArray[np.uint8]]
) -> None:
    theirs, _ = through_timm(pictures)
    apart = (embedded.prepare(pictures) - theirs).abs() * 255
    assert apart.max() <= 2
    assert apart.mean() < 0.1


def test_features_are_what_timm_gives(embedded: Surrogate, pictures: list[NDArray[np.uint8]]) -> None:
    theirs, features = through_timm(pictures)
    with torch.inference_mode():
        same_input = embedded.embed(theirs)
    torch.testing.assert_close(same_input, features, rtol=1e-4, atol=1e-4)
    own_input = torch.from_numpy(embedded.embed_pictures(pictures))
    assert torch.nn.functional.cosine_similarity(own_input, features).min() > 0.999


def test_the_head_turns_features_into_the_network_s_class_scores(
    embedded: Surrogate, pictures: list[NDArray[np.uint8]]
) -> None:
    path = str(pretrained.EMBEDDED_WEIGHTS)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": path}).eval()
    inputs = embedded.prepare(pictures)
    assert embedded.head is not None
    with torch.inference_mode():
        scores = embedded.embed(inputs).numpy() @ embedded.head[0].T + embedded.head[1]
        np.testing.assert_allclose(scores, whole((inputs - 0.5) / 0.5).numpy(), rtol=1e-3, atol=1e-3)
    assert scores[1].argmax() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


def test_gradients_reach_the_images_and_nothing_else(embedded: Surrogate) -> None:
    images = torch.full((2, 3, 48, 48), 0.5, requires_grad=True)
    embedded.embed(images, resize=True).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in embedded._network.parameters())
    assert not any(module.training for module in embedded._network.modules())


@pytest.mark.parametrize("count", [1, 7, 15, 17])
def test_the_number_of_threads_changes_no_bit_of_a_feature(
    embedded: Surrogate, pictures: list[NDArray[np.uint8]], count: int
) -> None:
    before, batch = torch.get_num_threads(), [pictures[number % len(pictures)] for number in range(count)]
    features = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            features.append(embedded.embed_pictures(batch))
    finally:
        torch.set_num_threads(before)
    assert features[0].shape[0] == count
    for others in features[1:]:
        np.testing.assert_array_equal(others, features[0])


def test_other_sides_are_resized_bilinearly_only_on_request(embedded: Surrogate) -> None:
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    larger = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        torch.testing.assert_close(embedded.embed(images, resize=True), embedded.embed(larger))
    with pytest.raises(ValueError, match=r"not \(1, 3, 96, 96\)"):
        embedded.embed(images)


def test_pictures_that_nobody_may_write_to_are_taken(embedded: Surrogate) -> None:
    picture = np.zeros((224, 300, 3), np.uint8)
    picture.setflags(write=False)
    assert embedded.prepare([picture]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (224, 224), (3000, 2)])
def test_every_picture_fills_the_input(embedded: Surrogate, shape: tuple[int, int]) -> None:
    prepared = embedded.prepare([np.full((*shape, 3), 200, np.uint8)])
    assert prepared.shape == (1, 3, 224, 224)
    assert (prepared * 255).round().unique().tolist() == [200]


def test_a_smaller_input_keeps_the_share_that_is_cropped() -> None:
    smaller = load_surrogate(EMBEDDED, weights=None, size=112, device="cpu")
    assert (smaller.input_size, smaller.resize, smaller.dimension) == (112, 128, 1280)


def test_altered_weights_of_the_package_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    altered = tmp_path / "weights.safetensors"
    altered.write_bytes(pretrained.EMBEDDED_WEIGHTS.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(pretrained, "EMBEDDED_WEIGHTS", altered)
    with pytest.raises(ConflictError, match="missing or altered; reinstall scumble"):
        load_surrogate(EMBEDDED, weights=None, size=None, device="cpu")


def test_the_card_states_the_digest_that_is_checked() -> None:
    card = (pretrained.EMBEDDED_WEIGHTS.parent / "README.md").read_text()
    assert pretrained.EMBEDDED_SHA256 in card
    assert sha256(pretrained.EMBEDDED_WEIGHTS.read_bytes()) == pretrained.EMBEDDED_SHA256
    assert f"{pretrained.EMBEDDED_WEIGHTS.stat().st_size:,} bytes" in card


def test_weights_of_a_user_are_read_from_safetensors_and_from_a_plain_pt_file(tmp_path: Path) -> None:
    tensors = load_file(pretrained.EMBEDDED_WEIGHTS)
    tensors["classifier.bias"] += 1
    save_file(tensors, tmp_path / "own.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "own.pt")
    for name in ("own.safetensors", "own.pt"):
        surrogate = load_surrogate(EMBEDDED, weights=tmp_path / name, size=None, device="cpu")
        assert surrogate.weights_sha256 == sha256((tmp_path / name).read_bytes())
        assert surrogate.head is not None
        np.testing.assert_allclose(surrogate.head[1], tensors["classifier.bias"].numpy())


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_as_weights_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="does not hold the weights of timm:resnet18"):
        load_surrogate("timm:resnet18", weights=tmp_path / "evil.pt", size=None, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18/IMAGENET1K_V1", "open_clip:RN50/openai"])
def test_weights_of_another_network_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"does not hold the weights of {name}"):
        load_surrogate(name, weights=pretrained.EMBEDDED_WEIGHTS, size=None, device="cpu")


def test_a_weights_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_surrogate(EMBEDDED, weights=tmp_path / "no.pt", size=None, device="cpu")
    assert str(caught.value) == f"--surrogate-weights {tmp_path / 'no.pt'}: file not found"


def test_torchvision_features_are_the_input_of_the_last_linear_layer(pictures: list[NDArray[np.uint8]]) -> None:
    surrogate = load_surrogate("torchvision:resnet18/random-3", weights=None, size=None, device="cpu")
    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert (surrogate.interpolation, surrogate.resize, surrogate.input_size) == ("bilinear", 256, 224)
    network = torchvision.models.resnet18()
    head = {"fc.weight": network.fc.weight, "fc.bias": network.fc.bias}
    network.load_state_dict(surrogate._network.state_dict() | head)
    caught: list[Tensor] = []
    network.eval().fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
        network(inputs)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (surrogate.mean, surrogate.std))
        torch.testing.assert_close(surrogate.embed(inputs * std + mean), caught[0], rtol=1e-3, atol=1e-3)
        apart = (surrogate.prepare(pictures) - (inputs * std + mean)).abs() * 255
    assert apart.max() <= 2


def test_clip_features_are_open_clip_s_own_joint_embedding(tiny_clip: str, tmp_path: Path) -> None:
    """Weights saved from a whole CLIP, loaded into the visual tower alone."""
    torch.manual_seed(0)
    whole = open_clip.create_model(tiny_clip, pretrained_image=False, load_weights=False).eval()
    save_file(whole.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "tags", lambda model: ["mine"])
        surrogate = load_surrogate(
            f"open_clip:{tiny_clip}/mine", weights=tmp_path / "tiny.safetensors", size=None, device="cpu"
        )
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (surrogate.mean, surrogate.std))
    with torch.inference_mode():
        expected = whole.encode_image((images - mean) / std)
        torch.testing.assert_close(surrogate.embed(images), expected, rtol=1e-4, atol=1e-5)
    assert surrogate.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert surrogate.dimension == 24
    assert surrogate.head is None
    assert not any("transformer.resblocks" in name and "visual" in name for name in surrogate._network.state_dict())


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_only_openai_s_weights_get_quick_gelu(monkeypatch: pytest.MonkeyPatch, tag: str, expected: bool) -> None:
    """Without it the features of OpenAI's weights are quietly wrong. Built here without any weights."""
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **given: create(name, **given | {"pretrained": None}))
    path = pretrained.EMBEDDED_WEIGHTS
    surrogate = load_surrogate(f"open_clip:ViT-B-32/{tag}", weights=path, size=None, device="cpu")
    found = [module for module in surrogate._network.modules() if isinstance(module, QuickGELU)]
    assert bool(found) is expected


def test_untrained_weights_belong_to_their_seed(tiny_clip: str) -> None:
    first, again, other = (
        load_surrogate(f"open_clip:{tiny_clip}/random-{seed}", weights=None, size=None, device="cpu")
        for seed in (0, 0, 1)
    )
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    state = torch.random.get_rng_state()
    load_surrogate(f"open_clip:{tiny_clip}/random-0", weights=None, size=None, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clip:ViT-B-32",
            "--surrogate 'clip:ViT-B-32' is not one of open_clip:MODEL/PRETRAINED, torchvision:MODEL/WEIGHTS, "
            "timm:MODEL; did you mean open_clip?",
        ),
        (
            "open_clip:ViT-B-23/openai",
            "--surrogate 'open_clip:ViT-B-23/openai': open_clip has no model 'ViT-B-23'; "
            "did you mean ViT-B-32, ViT-S-32, ViT-M-32?",
        ),
        (
            "open_clip:ViT-B-32/openia",
            "--surrogate 'open_clip:ViT-B-32/openia': open_clip ViT-B-32 has no weights 'openia'; did you mean openai?",
        ),
        (
            "torchvision:resnet50",
            "--surrogate 'torchvision:resnet50' does not name its weights: use torchvision:resnet50/WEIGHTS; "
            "it has IMAGENET1K_V1, IMAGENET1K_V2",
        ),
        (
            "torchvision:resnet50/V9",
            "--surrogate 'torchvision:resnet50/V9': torchvision resnet50 has no weights 'V9'; "
            "it has IMAGENET1K_V1, IMAGENET1K_V2",
        ),
        (
            "timm:tf_efficientnet_lite9",
            "--surrogate 'timm:tf_efficientnet_lite9': timm has no model 'tf_efficientnet_lite9'; "
            "did you mean tf_efficientnet_lite4, tf_efficientnet_lite3, tf_efficientnet_lite2?",
        ),
        (
            "timm:resnet18.tv_in2k",
            "--surrogate 'timm:resnet18.tv_in2k': timm resnet18 has no weights 'tv_in2k'; "
            "did you mean tv_in1k, a3_in1k, a2_in1k?",
        ),
    ],
)
def test_an_unknown_surrogate_is_refused_with_near_matches(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_surrogate(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name",
    [EMBEDDED, "timm:resnet18.tv_in1k", "open_clip:ViT-B-32/openai", "torchvision:resnet50/IMAGENET1K_V1"],
)
def test_the_papers_surrogates_are_known(name: str) -> None:
    check_surrogate(name)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("open_clip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai, open_clip_model.safetensors"),
        ("timm:resnet18", "timm/resnet18.a1_in1k, model.safetensors"),
    ],
)
def test_weights_that_cannot_be_had_are_named_with_the_way_out(name: str, source: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(InputError) as caught:
            load_surrogate(name, weights=None, size=None, device="cpu")
    text = str(caught.value)
    assert text.startswith(f"the weights of {name} are not on this machine and could not be downloaded (")
    assert text.endswith(
        f"): download them elsewhere ({source}) and pass --surrogate-weights FILE, "
        "or use --surrogate timm:tf_efficientnet_lite0, which is bundled"
    )


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(SettingsError, match="--surrogate-size 160 does not suit torchvision:vit_b_16/random-0"):
        load_surrogate("torchvision:vit_b_16/random-0", weights=None, size=160, device="cpu")


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(SettingsError, match="does not end in a linear layer"):
        load_surrogate("torchvision:squeezenet1_0/random-0", weights=None, size=None, device="cpu")


def test_a_gpu_that_is_not_there_is_said(embedded: Surrogate) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="torch sees none"):
        load_surrogate(EMBEDDED, weights=None, size=None, device="cuda")


@pytest.mark.slow
def test_the_embedded_surrogate_knows_imagenette(embedded: Surrogate, imagenette: Path) -> None:
    """The accuracy that the card states: 195 of 280 right among 1,000 classes."""
    assert embedded.head is not None
    right = right_of_ten = total = 0
    pending: list[tuple[NDArray[np.uint8], int]] = []
    with tarfile.open(imagenette / "imagenette144-test-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, data in members.items():
        if name.endswith(".json"):
            picture = members[name.removesuffix("json") + "jpg"]
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            pending.append((pixels, json.loads(data)["imagenet_index"]))
    ten = sorted({label for _, label in pending})
    for start in range(0, len(pending), 40):
        batch = pending[start : start + 40]
        scores = embedded.embed_pictures([pixels for pixels, _ in batch]) @ embedded.head[0].T + embedded.head[1]
        labels = np.array([label for _, label in batch])
        right += int((scores.argmax(axis=1) == labels).sum())
        right_of_ten += int((np.array(ten)[scores[:, ten].argmax(axis=1)] == labels).sum())
        total += len(batch)
    assert total == 280
    assert right / total == pytest.approx(0.696, abs=0.01)
    assert right_of_ten / total == pytest.approx(0.979, abs=0.01)
