"""Pictures are found under the names that people write; another name is refused, with the file that it may mean."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES
from ross_mcore.errors import SampleError
from ross_mcore.shards.pictures import PictureFolder, stored_names

DATA = b"\xff\xd8\xff" + b"a picture" * 20
URL = "data:image/jpeg;base64," + base64.b64encode(DATA).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    images = root / "images"
    for name in (
        "a.jpg",
        "Cat.JPG",
        "sub dir/b c.png",
        "Deep/er/d.png",
        "caf\u00e9.png",
        "back\\slash.jpg",
        "100%.jpg",
    ):
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA)
    (root / "secret.jpg").write_bytes(DATA)
    (images / "out").symlink_to(root)
    (root / "linked").symlink_to(images)
    return images


def test_names_of_pictures_as_people_write_them(folder: Path) -> None:
    pictures = PictureFolder(folder)
    for name in (
        "a.jpg",
        "./a.jpg",
        "sub dir/b c.png",
        "sub dir\\b c.png",
        ".\\sub dir\\b c.png",
        "back\\slash.jpg",
        "100%.jpg",
        str(folder / "a.jpg"),
        str(folder.parent / "linked" / "a.jpg"),
        f"file://{folder}/a.jpg",
        f"file://localhost{folder}/sub%20dir/b%20c.png",
        "file://sub dir/b c.png",
        "file:a.jpg",
        "../images/a.jpg",
        "sub dir/../a.jpg",
        URL,
        URL.replace("image/jpeg", ""),
        URL.partition(",")[2] if URL.partition(",")[2].startswith("/9j/") else URL,
        {"bytes": DATA, "path": None},
    ):
        assert pictures.read(name) == DATA, name
    assert PictureFolder(folder.parent / "linked").read(str(folder / "a.jpg")) == DATA
    assert PictureFolder(folder, follow_links=True).read("out/secret.jpg") == DATA


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("A.jpg", "No such file 'A.jpg'; did you mean a.jpg?"),
        ("cat.jpg", "did you mean Cat.JPG?"),
        ("a.png", "did you mean a.jpg?"),
        ("a", "did you mean a.jpg?"),
        ("deep/ER/D.jpg", "did you mean Deep/er/d.png?"),
        ("images/a.jpg", "No such file 'images/a.jpg'; it is in "),
        ("photos/a.jpg", "did you mean a.jpg?"),
        ("data\\images\\Cat.jpg", "did you mean Cat.JPG?"),
        ("sub%20dir/b%20c.png", "did you mean sub dir/b c.png?"),
        ("a.jpg?width=300", "did you mean a.jpg?"),
        ("/data/images/Deep/er/d.png", "leaves the image folder: write it relative to that folder, as Deep/er/d.png"),
        ("cafe\u0301.png", "did you mean caf\u00e9.png?"),
        ("C:\\data\\a.jpg", "did you mean a.jpg?"),
        ("nothing.jpg", "No such file 'nothing.jpg'"),
        ("a.jpg/b.jpg", "No such file"),
        ("../secret.jpg", "the image path leaves the image folder"),
        ("/data/images/a.jpg", "leaves the image folder: write it relative to that folder, as a.jpg"),
        ("file:///etc/passwd", "leaves the image folder"),
        ("out/secret.jpg", "by a link; --follow-links allows it"),
        ("sub dir", "not a regular file"),
        ("", "not a path"),
        ("a\0.jpg", "not a path"),
        (3, "not a path"),
        ("https://example.com/a.jpg", "the image is a URL: https:// is not fetched; download"),
        ("s3://bucket/a.jpg", "the image is a URL: s3:// is not fetched"),
        ("data:image/svg+xml,<svg/>", "a data URL that is not in base64"),
        ("data:image/png;base64,@@@", "whose base64 is damaged"),
        ("data:image/png;base64," + "A" * (MAX_IMAGE_BYTES * 4 // 3 + 8), "the image is over"),
        ({"bytes": bytes(MAX_IMAGE_BYTES + 1)}, "the image is over"),
    ],
)  # fmt: skip
def test_other_names_are_refused_with_the_remedy(name: Any, reason: str, folder: Path) -> None:
    with pytest.raises(SampleError) as error:
        PictureFolder(folder).read(name)
    assert reason in str(error.value) and len(str(error.value)) < 300
    assert ("did you mean" in str(error.value)) == ("did you mean" in reason)


def test_links_are_followed_on_request_only_downwards(folder: Path) -> None:
    for name in ("../secret.jpg", str(folder.parent / "secret.jpg"), "out/../../secret.jpg"):
        with pytest.raises(SampleError, match="leaves the image folder"):
            PictureFolder(folder, follow_links=True).read(name)


def test_a_folder_is_needed_for_names_only() -> None:
    assert PictureFolder(None).read(URL) == PictureFolder(None).read({"bytes": DATA}) == DATA
    with pytest.raises(SampleError, match="give --image-folder"):
        PictureFolder(None).read("a.jpg")


def test_stored_names_say_where_pictures_came_from() -> None:
    pictures = ["a.jpg", {"bytes": DATA, "path": "b.png"}, {"bytes": DATA, "path": None}, URL]
    assert stored_names(pictures, ["jpg", "png", "webp", "jpg"]) == [
        "a.jpg",
        "b.png",
        "embedded-2.webp",
        "embedded-3.jpg",
    ]
