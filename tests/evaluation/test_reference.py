import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.core.stats import fit_gaussian
from shortcut_jax.data.images import ENDINGS
from shortcut_jax.errors import ConfigError
from shortcut_jax.evaluation.features import pixels, random_network
from shortcut_jax.evaluation.reference import load_reference, open_reference, save_reference

FEATURES = pixels((2, 3, 3))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for i in range(9):
        name = tmp_path / "pictures" / ("sub" if i % 2 else ".") / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (2, 3, 3), np.uint8)).save(name)
    return tmp_path / "pictures"


def test_a_folder_gives_the_statistics_of_its_images_and_they_are_kept(folder, tmp_path):
    made = open_reference(str(folder), None, FEATURES, tmp_path / "cache")
    all_pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))])
    expected = fit_gaussian(FEATURES(all_pixels))
    np.testing.assert_allclose(made.gaussian.mean, expected.mean, atol=1e-12)
    np.testing.assert_allclose(made.gaussian.covariance, expected.covariance, atol=1e-12)
    assert made.num_images == 9 and made.features.shape == (9, 18)
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    again = open_reference(str(folder), None, FEATURES, tmp_path / "cache")
    np.testing.assert_array_equal(again.gaussian.covariance, made.gaussian.covariance)
    assert kept.stat().st_mtime_ns == before and again.num_images == 9


def test_statistics_of_other_tools_are_read_and_ours_have_their_names(tmp_path):
    mean, covariance = np.arange(18.0), np.eye(18)
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    theirs = load_reference(tmp_path / "theirs.npz", FEATURES)
    assert theirs.features is None and theirs.num_images == 0
    np.testing.assert_array_equal(theirs.gaussian.mean, mean)
    save_reference(tmp_path / "ours.npz", theirs, FEATURES)
    with np.load(tmp_path / "ours.npz") as arrays:
        np.testing.assert_array_equal(arrays["mu"], mean)
        np.testing.assert_array_equal(arrays["sigma"], covariance)


def _save_as_one(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(18))


def _save_with(path, **more):
    np.savez(path, mu=np.zeros(18), sigma=np.eye(18), **more)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: None, r"are not found: make them with python -m shortcut_jax.evaluate --save_reference"),
        (lambda path: path.write_bytes(b"no"), "cannot be used .*not a zip"),
        (lambda path: np.savez(path, mean=np.zeros(18)), "has no mu and sigma, but mean"),
        (lambda path: np.savez(path, mu=np.zeros(4), sigma=np.eye(4)), r"statistics of 4 features, but 18 are asked"),
        (lambda path: np.savez(path, mu=np.zeros(18), sigma=np.eye(18), label="FID"), "is for FID, but Frechet"),
        (lambda path: _save_as_one(path), r"it is one array \(\.npy\)"),
        (
            lambda path: np.savez(path, mu=np.zeros(18).astype(str), sigma=np.eye(18)),
            r"mu has the shape .* the type <U32",
        ),
        (lambda path: np.savez(path, mu=np.zeros(18), sigma=np.eye(18).astype(object)), "Python objects"),
        (lambda path: np.savez(path, mu=np.zeros((18, 1)), sigma=np.eye(18)), r"mu has the shape \(18, 1\)"),
        (lambda path: np.savez(path, mu=np.zeros(()), sigma=np.eye(18)), r"mu has the shape \(\)"),
        (lambda path: np.savez(path, mu=np.zeros(18), sigma=np.eye(17)), r"sigma has the shape \(17, 17\)"),
        (lambda path: np.savez(path, mu=np.full(18, np.nan), sigma=np.eye(18)), "mu has values that are not finite"),
        (
            lambda path: np.savez(path, mu=np.zeros(18), sigma=np.full((18, 18), np.inf)),
            "sigma has values that are not finite",
        ),
        (lambda path: np.savez(path, mu=np.zeros(18), sigma=np.triu(np.ones((18, 18)))), "sigma is not symmetric"),
        (lambda path: np.savez(path, mu=np.zeros(18), sigma=-np.eye(18)), "negative eigenvalues"),
        (lambda path: _save_with(path, features=np.zeros((5, 4), "f4")), r"features has the shape \(5, 4\)"),
        (lambda path: _save_with(path, features=np.full((5, 18), np.nan, "f4")), "features has values that are not"),
        (lambda path: _save_with(path, count=np.zeros(3)), r"count has the shape \(3,\)"),
        (lambda path: _save_with(path, label=3), "label has the shape"),
        (lambda path: _save_with(path, source="x" * 20_000), "source is a text of 80,000 bytes"),
    ],
)
def test_what_is_no_reference_is_told_with_how_to_make_one(make, pattern, tmp_path):
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(ConfigError, match=pattern) as error:
        open_reference(str(path), None, FEATURES, tmp_path)
    assert "--save_reference=FILE.npz" in str(error.value) and "\n" not in str(error.value)


def test_a_zip_bomb_is_refused_by_its_headers(tmp_path):
    path, header = tmp_path / "bomb.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 14, 1 << 14)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu.npy", "sigma.npy", "unknown.npy"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(header.getvalue())
                for _ in range(64):  # 64 MB here; a file that is honest about 2 GB is refused all the same
                    file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"mu\.npy is cut off|mu has the shape \(16384, 16384\)"):
        load_reference(path, FEATURES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_covariances_in_float32_are_read(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((9, 18)).astype(np.float32)  # fewer samples than features: it is singular
    np.savez(tmp_path / "x.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False, dtype=np.float32))
    assert load_reference(tmp_path / "x.npz", FEATURES).gaussian.covariance.dtype == np.float64


def test_no_reference_at_all_and_too_few_images(folder, tmp_path):
    with pytest.raises(ConfigError, match="reference statistics are missing"):
        open_reference(None, None, FEATURES, tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="has 0 images"):
        open_reference(str(empty), None, FEATURES, tmp_path)


def test_the_images_of_a_reference_are_those_of_every_source(folder, tmp_path):
    forms = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "avif": "AVIF", "webp": "WEBP", "png": "PNG"}
    for ending in ENDINGS:
        Image.new("RGB", (3, 2), "red").save(folder / f"x.{ending}", forms.get(ending, "JPEG"))
    Image.new("RGB", (3, 2)).save(folder / "LARGE.PNG")
    for name in ("._x.png", "__MACOSX/x.png", "notes.txt", "folder.png/1.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert open_reference(str(folder), None, FEATURES, tmp_path).num_images == 9 + len(ENDINGS) + 1


def test_bad_images_are_left_out_and_told_up_to_a_share(folder, tmp_path):
    expected = open_reference(str(folder), None, FEATURES, tmp_path / "clean")
    (folder / "bad.jpg").write_bytes(b"\x89PNG\r\n\x1a\n bad")
    for cache in ("a", "a"):  # the second time from what was kept
        found = open_reference(str(folder), None, FEATURES, tmp_path / cache)
        assert found.num_images == 9 and found.source == f"images of {folder} (1 truncated left out)"
        np.testing.assert_array_equal(found.gaussian.mean, expected.gaussian.mean)
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ConfigError, match=r"of 11 images more than 5% .*1 not a file, 1 truncated so far.*pipe\.png"):
        open_reference(str(folder), None, FEATURES, tmp_path / "a")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (3, 2)).save(few / "1.png")
    (few / "2.png").write_bytes(b"bad")
    with pytest.raises(ConfigError, match="cannot be used"):
        open_reference(str(few), None, FEATURES, tmp_path / "a")


def test_images_of_several_sizes_have_features_each(folder, tmp_path):
    Image.new("RGB", (40, 30), "red").save(folder / "large.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    assert open_reference(str(folder), None, random_network(0, 8), tmp_path).num_images == 11
