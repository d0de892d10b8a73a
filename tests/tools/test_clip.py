"""CLIP's images through a real Triton: vectors, errors, load and damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import small_models
from conftest import ROOT, free_options, resident_bytes, version_folder
from test_images import bad_files
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from halimede_engine import session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidModel
from halimede_tools.build import check, describe, model_config, towers
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.kinds.recognise import PREPROCESSING
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import pictures
from halimede_tools.build.vision import encoder
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

NAMES = {"fp32": "clip-image", "fp16": "clip-image-fp16", "int8": "clip-image-int8"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("clip")
    return Settings(home=folder / "home", repository=folder / "repository")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.clip(tmp_path_factory.mktemp("folder") / "clip")


@pytest.fixture(scope="module")
def server(
    home: Settings, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[wheel.Server]:
    """A running Triton with both towers in all precisions. So small a model misses its size."""
    build(build_request(str(folder), "clip", accepted=("fp16", "int8")), home)
    run = tmp_path_factory.mktemp("run")
    with wheel.serve(home.repository, home.python_backend, run, free_options()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: wheel.Server) -> Iterator[triton_grpc.InferenceServerClient]:
    with triton_grpc.InferenceServerClient(server.grpc_address) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return check.image_reference(folder, files(), ModelOptions("clip"))


def files() -> list[bytes]:
    return pictures.check_pictures(72)


def embed(
    client: Any, images: list[bytes], model: str = "clip-image", dimensions: int | None = None
) -> dict[str, np.ndarray]:
    """All outputs of one request, by plain tritonclient."""
    inputs = [triton_grpc.InferInput("IMAGE", [len(images), 1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array(images, np.object_).reshape(-1, 1))
    if dimensions is not None:
        inputs.append(triton_grpc.InferInput("DIMENSIONS", [len(images), 1], "INT32"))
        inputs[1].set_data_from_numpy(np.full((len(images), 1), dimensions, np.int32))
    answer = client.infer(model, inputs)
    return {name: answer.as_numpy(name) for name in ("EMBEDDING", "WIDTH", "HEIGHT", "FORMAT")}


@pytest.mark.parametrize("precision", NAMES)
def test_served_vectors_are_transformers_own(
    client: Any, expected: np.ndarray, precision: str
) -> None:
    """Every format, alone and in batches: the mean cosine of the precision's bar, L2 norm 1."""
    images, bar = files(), towers.IMAGE_BARS[precision]
    parts = [images[start : start + 16] for start in range(0, len(images), 16)]
    together = np.concatenate(
        [embed(client, part, NAMES[precision])["EMBEDDING"] for part in parts]
    )
    alone = np.concatenate([embed(client, [one], NAMES[precision])["EMBEDDING"] for one in images])
    assert vectors.cosine(together, expected).mean() >= bar.mean_cosine
    assert vectors.cosine(together, alone).min() >= bar.invariance
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    if precision == "fp32":
        assert vectors.cosine(together, expected).min() >= 0.99999


def test_answers_carry_size_and_format(client: Any) -> None:
    """WIDTH and HEIGHT are of the picture as seen; DIMENSIONS cuts the vector."""
    turned = pictures.encoded(pictures.drawn(1, 60, 40), pictures.Form("JPEG", "RGB", {}, 6))
    plain = pictures.encoded(pictures.drawn(2, 33, 77), pictures.Form("WEBP", "RGB"))
    answer = embed(client, [turned, plain], dimensions=8)
    assert answer["WIDTH"].tolist() == [[40], [33]]
    assert answer["HEIGHT"].tolist() == [[60], [77]]
    assert answer["FORMAT"].tolist() == [[b"JPEG"], [b"WEBP"]]
    assert answer["EMBEDDING"].shape == (2, 8)


def test_configs_say_what_is_taken_and_name_the_other_tower(home: Settings) -> None:
    """Both towers have one space; each names the other, in its own precision."""
    facts = spec.load(version_folder(home.repository / "clip-image-int8"))
    images = model_config.read(home.repository / "clip-image-int8" / "config.pbtxt").parameters
    texts = model_config.read(home.repository / "clip-int8" / "config.pbtxt").parameters
    said = {key: value.string_value for key, value in images.items()}
    assert said.pop("below_bar")
    assert said == {
        "space": facts.space,
        "precision": "int8",
        "arithmetic": "int8",
        "dims": "32",
        "input": "image",
        "text_model": "clip-int8",
        "max_image_bytes": "10485760",
        "max_image_pixels": "64000000",
    }
    assert texts["image_model"].string_value == "clip-image-int8"
    assert texts["space"].string_value == facts.space


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_fail_alone(client: Any, name: str) -> None:
    """Each gives its own typed error; a good image sent beside it is embedded."""
    data, error, part = bad_files()[name]
    good = files()[0]
    with ThreadPoolExecutor(2) as senders:
        bad, fine = (
            senders.submit(embed, client, [good, data]),
            senders.submit(embed, client, [good]),
        )
        with pytest.raises(InferenceServerException, match=f"{error.__name__}: image 1 .*{part}"):
            bad.result()
        assert fine.result()["EMBEDDING"].shape == (1, 32)


def test_two_thousand_images_with_broken_ones(
    client: Any, server: wheel.Server, expected: np.ndarray
) -> None:
    """At concurrency 16, 5 % broken: each good one is right, each bad one has its own error, and
    the second thousand takes no more memory than the first.
    """
    good, bad = files(), list(bad_files().values())
    memory: list[int] = []

    def send(number: int) -> None:
        if number in (1000, 1999):
            memory.append(resident_bytes(server.process.pid))
        if number % 20 == 19:
            data, error, _ = bad[number // 20 % len(bad)]
            with pytest.raises(InferenceServerException, match=f"{error.__name__}: image 0"):
                embed(client, [data])
            return
        vector = embed(client, [good[number % len(good)]])["EMBEDDING"]
        assert vectors.cosine(vector, expected[number % len(good)][None])[0] >= 0.99999

    with ThreadPoolExecutor(16) as senders:
        list(senders.map(send, range(2000)))
    first, second = memory
    assert second < 1.05 * first + 20e6


def test_damaged_files_crash_nothing() -> None:
    """5,400 mutated files end as pictures or typed errors, in bounded memory."""
    command = [sys.executable, "-X", "faulthandler", "tests/mutations.py", "5400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("peak_mb") < 1500
    assert sum(outcomes.values()) == 5400
    assert set(outcomes) <= {"picture", "InvalidImage", "ImageTooLarge", "OutOfMemory"}
    assert outcomes["picture"] > 500 and outcomes["InvalidImage"] > 1000


def test_damaged_files_crash_no_server(client: Any) -> None:
    """400 more through Triton: an answer or a typed error each, and the server goes on."""

    def send(data: bytes) -> str:
        try:
            return str(embed(client, [data])["EMBEDDING"].shape)
        except InferenceServerException as error:
            return error.message().split("', ")[-1].split(":")[0]

    with ThreadPoolExecutor(8) as senders:
        outcomes = set(senders.map(send, mutations.mutated(400, seed=1)))
    assert outcomes <= {"(1, 32)", "InvalidImage", "ImageTooLarge", "OutOfMemory"}
    assert len(outcomes) >= 2
    assert embed(client, [files()[0]])["EMBEDDING"].shape == (1, 32)


def test_scaling_is_part_of_the_graph(home: Settings, folder: Path, server: Any, tmp_path) -> None:
    """What reaches the vision tower within the graph is transformers' pixel tensor, within 1e-5."""
    import onnx
    import onnxruntime
    from test_images import expected as pixel_values

    from halimede_ops import image
    from halimede_tools.build.graph import rewrite

    model = rewrite.load(home.models / "clip" / "image-fp32" / session.FILE_NAME)
    scaled = next(node.input[0] for node in model.graph.node if node.op_type == "Conv")
    model.graph.output.append(onnx.ValueInfoProto(name=scaled))
    run = onnxruntime.InferenceSession(model.SerializeToString()).run
    taken = spec.load(version_folder(home.repository / "clip-image")).images()
    processor = encoder.image_processor(folder, "clip")
    for data in files():
        pixels = image.prepare(data, taken).pixels[None]
        [got] = run([scaled], {spec.PIXELS: pixels})
        assert np.abs(got[0] - pixel_values(data, processor)).max() <= 1e-5


def test_layers_of_vit_b32_as_published(tmp_path: Path) -> None:
    """Layers of 768, 224 pixels, random weights: FP32 and INT8 reach their bars, the files are as
    large as they should be, and INT8 needs no OpenVINO.
    """
    from halimede_tools.build.export import export_images
    from halimede_tools.build.int8 import to_int8

    folder = small_models.clip_vit_b32(tmp_path / "model")
    model = describe.load(folder, ModelOptions("vit"))
    facts = describe.describe(model, folder, ModelOptions("vit"))
    assert (facts.dims, facts.images().positions) == (512, 50)
    fp32, int8 = tmp_path / "fp32" / session.FILE_NAME, tmp_path / "int8" / session.FILE_NAME
    for path in (fp32, int8):
        path.parent.mkdir()
    export_images(folder, ModelOptions("vit"), fp32.parent)
    some = pictures.check_pictures(16)
    to_int8(fp32, towers.IMAGES, facts, pictures.calibration_pictures(12), some[:8], int8)
    reference = check.image_reference(folder, some, ModelOptions("vit"))
    for precision, path in (("fp32", fp32), ("int8", int8)):
        engine = towers.Engine(path, towers.image_rows(fp32.parent, facts), facts)
        record = check.check(
            precision, path, fp32, engine, towers.IMAGES, some, reference, check.tool_versions()
        )
        assert record["missed"] == []
    plain, _ = session.open_session(int8)  # onnxruntime's own kernels, as where OpenVINO is not
    rows = engine.rows(some)
    assert vectors.cosine(plain.run(rows), engine.session.run(rows)).min() >= 0.999


def test_preprocessing_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    """A processor that is not CLIP's, or that does not fit the tower, is named."""
    fields = json.loads((folder / PREPROCESSING).read_text())
    model = describe.load(folder, ModelOptions("clip"))

    def refused(match: str, **changed: Any) -> None:
        (tmp_path / PREPROCESSING).write_text(json.dumps(fields | changed))
        with pytest.raises(InvalidModel, match=match):
            describe.image_spec(model, tmp_path, "clip")

    refused("names DonutImageProcessor", image_processor_type="DonutImageProcessor")
    refused("gives 48 x 48 pixels", crop_size={"height": 48, "width": 48})


def test_a_preprocessing_of_older_releases(folder: Path, tmp_path: Path) -> None:
    """Sizes as plain numbers, and no rescaling named, mean what they meant."""
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32,
           "do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3,
           "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}  # fmt: skip
    (tmp_path / PREPROCESSING).write_text(json.dumps(old))
    model = describe.load(folder, ModelOptions("clip"))
    taken = describe.image_spec(model, tmp_path, "clip")
    assert (taken.resize, taken.height, taken.scale) == ((32,), 32, 1 / 255)


def test_the_space_covers_the_preprocessing(folder: Path, tmp_path: Path) -> None:
    """Another mean makes another space."""
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / PREPROCESSING
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    spaces = {
        describe.describe(describe.load(one, ModelOptions("clip")), one, ModelOptions("clip")).space
        for one in (folder, other)
    }
    assert len(spaces) == 2
