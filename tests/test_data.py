import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amskv_jax.errors import AmskvError
from amskv_jax.training.data import draw_pictures, load_pictures, spread


def picture(height=8, width=8, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_packed(path, pictures, **changes):
    files = [encoded(image) for image in pictures]
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(len(files), dtype=np.uint8) % 2,
        "classes": np.array(["cat", "dog"]),
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("dog", "cat")):
        (tmp_path / name).mkdir()
        for index in range(2):
            picture(seed=10 * label + index).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat/notes.txt").write_text("not a picture")
    return tmp_path


def test_packed_file(tmp_path):
    images = [picture(seed=index) for index in range(3)]
    data = load_pictures(write_packed(tmp_path / "data.npz", images), (8, 8))
    np.testing.assert_array_equal(data.pixels, np.stack([np.asarray(image) for image in images]))
    assert data.labels.tolist() == [0, 1, 0]
    assert data.classes == ("cat", "dog")
    assert len(data) == 3


def test_folder_of_class_folders(folder):
    data = load_pictures(folder, (8, 8))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(data.pixels[0], np.asarray(picture(seed=10)))


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_other_modes_become_rgb(folder, mode):
    image = picture(mode=mode)
    image.save(folder / "cat/0.png")
    pixels = load_pictures(folder, (8, 8)).pixels[0]
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_cropping_keeps_the_centre(folder):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(folder / "cat/0.png")
    assert (load_pictures(folder, (8, 8), crop=True).pixels[0] == 255).all()


def test_exif_orientation_is_applied(folder):
    image = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(folder / "cat/0.png", exif=exif)
    pixels = load_pictures(folder, (8, 8)).pixels[0]
    np.testing.assert_array_equal(pixels, np.asarray(image)[::-1, ::-1])


def spoil_empty_class(folder):
    (folder / "bird").mkdir()


def spoil_no_classes(folder):
    for file in [*folder.rglob("*.*")]:
        file.unlink()
    for name in ("cat", "dog"):
        (folder / name).rmdir()


def spoil_bytes(folder):
    (folder / "cat/1.png").write_bytes(b"no picture")


def spoil_truncated(folder):
    file = folder / "cat/1.png"
    file.write_bytes(file.read_bytes()[:60])


def spoil_transparent(folder):
    picture(mode="RGBA").save(folder / "cat/1.png")


def spoil_deep(folder):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "cat/1.png")


def spoil_size(folder):
    picture(9, 7).save(folder / "cat/1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_empty_class, r"bird holds no pictures"),
        (spoil_no_classes, r"no subfolders: expected one per class"),
        (spoil_bytes, r"cat/1\.png is not a readable picture"),
        (spoil_truncated, r"cat/1\.png is not a readable picture"),
        (spoil_transparent, r"cat/1\.png is transparent"),
        (spoil_deep, r"cat/1\.png has mode I;16"),
        (spoil_size, r"cat/1\.png is 9x7 pixels \(height x width\), expected 8x8.*cropping"),
    ],
)
def test_unsuitable_folder_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(AmskvError, match=message):
        load_pictures(folder, (8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "lacks labels"),
        ({"labels": np.array([0, 2])}, "labels run from 0 to 2, but there are 2 classes"),
        ({"offsets": np.array([0, 5])}, "expected 3 growing offsets"),
        ({"offsets": np.array([0, 5, 10**9])}, "expected 3 growing offsets"),
        ({"labels": np.array([], int), "offsets": np.array([0])}, "holds no pictures"),
        ({"jpeg": np.zeros(1000, np.uint8)}, "picture 0 of .* not a readable picture"),
    ],
)
def test_unsuitable_packed_file_is_refused(tmp_path, changes, message):
    path = write_packed(tmp_path / "data.npz", [picture(), picture()], **changes)
    with pytest.raises(AmskvError, match=message):
        load_pictures(path, (8, 8))


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    path.write_text("hello")
    with pytest.raises(AmskvError, match=r"not a readable \.npz file"):
        load_pictures(path, (8, 8))
    np.save(tmp_path / "data.npy", np.zeros(3))
    with pytest.raises(AmskvError, match=r"not a readable \.npz file"):
        load_pictures(tmp_path / "data.npy", (8, 8))
    with pytest.raises(AmskvError, match="no such file or folder"):
        load_pictures(Path("nowhere"), (8, 8))


def test_data_must_suit_the_model(folder):
    data = load_pictures(folder, (8, 8))
    data.check((8, 8), num_classes=2)
    with pytest.raises(AmskvError, match=r"2 classes, the model 10"):
        data.check((8, 8), num_classes=10)
    with pytest.raises(AmskvError, match=r"8x8 pixels \(height x width\), the model's 16x16"):
        data.check((16, 16))


def test_draws_are_shuffled_epochs():
    index, chance = draw_pictures(10, seed=0, start=0, count=30)
    epochs = index.reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(set(chance)) == 30
    assert ((chance >= 0) & (chance < 1)).all()


@pytest.mark.parametrize(("start", "count"), [(0, 3), (7, 6), (25, 5), (10, 10)])
def test_draws_do_not_depend_on_where_a_run_starts(start, count):
    whole = draw_pictures(10, seed=3, start=0, count=30)
    part = draw_pictures(10, seed=3, start=start, count=count)
    np.testing.assert_array_equal(part, [column[start : start + count] for column in whole])
    assert (draw_pictures(10, seed=4, start=0, count=30).rows != whole.rows).any()


def test_pictures_are_chosen_from_all_over_a_set():
    np.testing.assert_array_equal(spread(10, 5), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(spread(3, 5), [0, 1, 2])
