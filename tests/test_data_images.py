"""Folders and zips of pictures: captions by every road, and whatever a person may throw at them."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import (
    ArchiveError,
    EmptyError,
    FormatError,
    Limits,
    NothingLeftError,
    NotTakenError,
    PictureError,
    TooLargeError,
    fingerprint,
    load,
    open_picture,
    prepare,
    profile,
    read,
    recognise,
)
from studio.datasets import Datasets
from studio.store import Store


def png(colour: str = "red", side: int = 8, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), colour).save(out, "PNG")
    return out.getvalue()


def huge_png() -> bytes:
    """30,000 x 30,000 black pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 3751 * 100))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def folder(path: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BESIDE: dict[str, bytes | str] = {"a.png": png(), "a.txt": "a red square\n", "b/c.PNG": png("blue"), "b/c.txt": "blau"}
JSONL: dict[str, bytes | str] = {
    "a.png": png(),
    "c.png": png("blue"),
    "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "a red square"})
    + "\n"
    + json.dumps({"file_name": "c.png", "text": "blau"}),
}
CSV: dict[str, bytes | str] = {
    "set/a.png": png(),
    "set/c.png": png("blue"),
    "set/metadata.csv": "\ufefffile_name,text\na.png,a red square\nc.png,blau\n",
}


@pytest.mark.parametrize("pack", [zipped, folder])
@pytest.mark.parametrize("files", [BESIDE, JSONL, CSV], ids=["beside", "jsonl", "csv"])
def test_captions_by_every_road(tmp_path: Path, files: dict[str, bytes | str], pack: object) -> None:
    where = pack(tmp_path / ("set.zip" if pack is zipped else "set"), files)  # type: ignore[operator]
    prepared = load(where)
    assert prepared.format == "images" and prepared.kept == 2 and not prepared.problems
    assert [example["text"] for example in prepared.examples] == ["a red square", "blau"]
    first, second = (open_picture(example["image"]) for example in prepared.examples)
    assert first.mode == "RGB" and first.getpixel((0, 0)) == (255, 0, 0) and second.getpixel((0, 0)) == (0, 0, 255)
    shown = profile(prepared)
    assert shown["characters"]["max"] == len("a red square") and json.dumps(shown)


def test_pictures_without_words_are_a_format_of_their_own(tmp_path: Path) -> None:
    where = zipped(tmp_path / "dog.zip", {"1.png": png(), "2.png": png("green")})
    assert recognise(read(where)).name == "pictures"
    assert [example["text"] for example in load(where).examples] == ["", ""]
    with pytest.raises(NotTakenError, match="pictures, which this run cannot learn from"):
        load(where, formats=("images",))
    captioned = zipped(tmp_path / "both.zip", BESIDE)
    assert load(captioned, "pictures").examples[0]["text"] == ""


def test_a_table_is_not_read_as_pictures(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,text\n/etc/passwd,secret\n")
    with pytest.raises(FormatError, match="a folder or a zip of pictures"):
        load(path, "images")
    assert load(path).format == "text"
    with pytest.raises(FormatError, match="tables of texts"):
        load(zipped(tmp_path / "set.zip", BESIDE), "text")


def test_what_cannot_be_used_is_listed_and_the_rest_kept(tmp_path: Path) -> None:
    cut = png(side=64)[:-40]
    frames = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    printed, deep = io.BytesIO(), io.BytesIO()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(printed, "JPEG")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep, "PNG")
    clear = png((0, 0, 0, 0), mode="RGBA")  # type: ignore[arg-type]
    pictures = {
        "cut.png": cut,
        "text.png": b"not a picture",
        "empty.png": b"",
        "huge.png": huge_png(),
        "moving.gif": frames.getvalue(),
        "print.jpg": printed.getvalue(),
        "deep.png": deep.getvalue(),
        "clear.png": clear,
        "silent.png": png(),
    }
    files: dict[str, bytes | str] = {**pictures, "__MACOSX/._cut.png": b"x", ".DS_Store": b"x"}
    files |= {f"{name.rpartition('.')[0]}.txt": name for name in pictures if name != "silent.png"}
    prepared = load(zipped(tmp_path / "set.zip", files))
    assert prepared.total == len(pictures) == prepared.kept + prepared.skipped
    assert sorted(example["text"] for example in prepared.examples) == [
        "clear.png", "deep.png", "moving.gif", "print.jpg",
    ]  # fmt: skip
    assert dict(prepared.counts) == {
        "picture": 3, "picture-too-large": 1, "no-caption": 1, "animated": 1, "cmyk": 1, "deep": 1,
    }  # fmt: skip
    said = {problem.code: str(problem) for problem in prepared.problems}
    assert "900000000" in said["picture-too-large"] and "silent.png" in said["no-caption"]
    seen = {example["text"]: open_picture(example["image"]).getpixel((1, 1)) for example in prepared.examples}
    assert seen["moving.gif"] == (255, 0, 0) and seen["clear.png"] == (255, 255, 255)
    assert seen["deep.png"] == (155, 155, 155)
    red, green, blue = seen["print.jpg"]  # type: ignore[misc]
    assert red > 200 and green < 60 and blue < 60


def test_a_picture_turned_by_its_camera(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), "white")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(str(tmp_path / "a.jpg")).size == (4, 8)


@pytest.mark.parametrize("name", ["../out.png", "/etc/a.png", "C:\\a.png", "a/..\\b.png"])
def test_a_name_that_leads_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match="leads out"):
        read(zipped(tmp_path / "set.zip", {"a.png": png(), name: png()}))


def test_a_million_entries(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"a.png": png()})
    raw = path.read_bytes()
    end = raw.rfind(b"PK\x05\x06")
    # What a zip of a million entries says at its end; nothing else of it is looked at.
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 10**6, 10**6, 10**8, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    full = struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(raw[:end] + wide + locator + b"PK\x05\x06" + full)
    with pytest.raises(TooLargeError, match="1,000,000 files"):
        read(path)
    many = zipped(tmp_path / "many.zip", {f"{n}.png": png() for n in range(7)})
    with pytest.raises(TooLargeError, match="lists 7 files; at most 6"):
        read(many, limits=Limits(max_pictures=2))
    with pytest.raises(TooLargeError, match="4 pictures; at most 3"):
        read(zipped(tmp_path / "four.zip", {f"{n}.png": png() for n in range(4)}), limits=Limits(max_pictures=3))


def test_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 2**22)
    with pytest.raises(TooLargeError, match="unpacked"):
        read(path, limits=Limits(max_unpacked_zip=2**20))
    with pytest.raises(NothingLeftError, match="at most 1 are opened"):
        load(path, limits=Limits(max_picture_bytes=2**20))
    with pytest.raises(TooLargeError, match="MiB are read"):
        read(path, limits=Limits(max_zip_bytes=100))


def test_too_many_pixels(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"a.png": png(side=20), "b.png": png(side=10)})
    table = read(path, limits=Limits(max_pixels=200))
    assert len(table.rows) == 1 and "20 x 20 pixels; at most 200" in str(table.problems[0])


def test_no_zip_an_empty_one_an_encrypted_one(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ArchiveError, match="no zip, or was cut off"):
        read(path)
    zipped(path, {})
    with pytest.raises(EmptyError, match="no picture"):
        read(path)
    with pytest.raises(EmptyError, match=r"it has \.docx"):
        read(zipped(path, {"letter.docx": "x"}))
    zipped(path, {"a.png": png()})
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(ArchiveError, match="encrypted"):
        read(path)


def test_a_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    where = folder(tmp_path / "set", {"a.png": png(), "a.txt": "a"})
    (where / "b.png").symlink_to(tmp_path / "secret.png")
    assert len(read(where).rows) == 1


def test_metadata_that_names_what_is_not_there(tmp_path: Path) -> None:
    rows = [{"file_name": "gone.png", "text": "x"}, {"file_name": "../a.png", "text": "x"}, {"text": "x"}]
    rows += [{"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"}]
    lines = "\n".join([*(json.dumps(row) for row in rows), "{broken"])
    prepared = load(zipped(tmp_path / "set.zip", {"a.png": png(), "b.png": png(), "metadata.jsonl": lines}))
    assert [example["text"] for example in prepared.examples] == ["one", "two"]
    assert dict(prepared.counts) == {"no-picture": 4, "no-caption": 1, "other-answer": 1}


def test_a_reference_to_nothing(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", BESIDE)
    for reference in (str(tmp_path / "no.png"), f"{path}!no.png", f"{tmp_path}/no.zip!a.png"):
        with pytest.raises(PictureError, match="cannot be opened"):
            open_picture(reference)


def test_a_folder_has_a_fingerprint_by_names_and_contents(tmp_path: Path) -> None:
    one, same = folder(tmp_path / "one", BESIDE), folder(tmp_path / "same", BESIDE)
    other = folder(tmp_path / "other", {**BESIDE, "a.txt": "changed"})
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_a_zip_is_kept_by_the_studio(tmp_path: Path) -> None:
    sets = Datasets(Store(tmp_path / "home" / "studio.db"), tmp_path / "home")
    found = sets.bring_in(zipped(tmp_path / "set.zip", BESIDE))
    assert found.format == "images" and found.prepared is not None and found.prepared.kept == 2
    again = sets.open(found.id)
    assert again.prepared is not None and open_picture(again.prepared.examples[0]["image"]).size == (8, 8)
    assert prepare(read(Path(sets.store.dataset(found.id)["path"]))).kept == 2
