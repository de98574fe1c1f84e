"""Archives, folders and pictures made to harm or to mislead: refused by name or listed, never dropped silently."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import ArchiveError, EmptyError, FileError, TooLargeError, load, open_picture, read
from engine.errors import DataError
from tests.test_data_images import folder, huge_png, png, zipped


def million(path: Path, narrow: int, wide: int | None) -> Path:
    """A zip whose table holds a million entries, and what its one or two records at the end say of their number."""
    raw = zipped(path, {"a.png": png(), "a.txt": "a"}).read_bytes()
    start, end = raw.find(b"PK\x01\x02"), raw.rfind(b"PK\x05\x06")
    table = raw[start : raw.find(b"PK\x01\x02", start + 4)] * 10**6
    tail = b""
    if wide is not None:
        tail = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, wide, wide, len(table), start)
        tail += b"PK\x06\x07" + struct.pack("<IQI", 0, start + len(table), 1)
    length = len(table) if wide is None else 60
    last = raw[end : end + 8] + struct.pack("<HHIIH", narrow, narrow, length, start, 0)
    path.write_bytes(raw[:start] + table + tail + last)
    return path


@pytest.mark.parametrize(
    ("narrow", "wide"), [(65_535, 10**6), (2, None), (1, 2)], ids=["honest", "narrow lies", "both lie"]
)
def test_a_million_real_entries_are_refused_quickly_and_in_little_memory(
    tmp_path: Path, narrow: int, wide: int | None
) -> None:
    """A reader without a guard builds a million records, whatever number the end of the file gives.

    Where a wide record stands before the narrow one, Python's reader goes by it alone.
    """
    path = million(tmp_path / "set.zip", narrow, wide)
    assert path.stat().st_size > 50_000_000
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(TooLargeError, match=r"lists 1,000,000 files; at most 300,000"):
        read(path)
    assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


def test_the_table_of_a_zip_is_read_once_for_all_its_pictures(tmp_path: Path) -> None:
    """Opening it anew for each picture would make this take minutes."""
    path = zipped(tmp_path / "set.zip", {f"{n:05}.{kind}": png() if kind == "png" else "words"
                                         for n in range(3_000) for kind in ("png", "txt")})  # fmt: skip
    started = time.perf_counter()
    prepared = load(path)
    assert prepared.kept == 3_000 and time.perf_counter() - started < 30
    assert all(open_picture(example["image"]).size == (8, 8) for example in prepared.examples[:200])


def test_a_zip_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"a.png": png("red")})
    assert open_picture(f"{path}!a.png").getpixel((0, 0)) == (255, 0, 0)
    zipped(path, {"a.png": png("blue", side=9), "b.png": png()})
    assert open_picture(f"{path}!a.png").getpixel((0, 0)) == (0, 0, 255)


def test_links_in_a_zip_are_not_followed_and_listed(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"a.png": png(), "c.png": png()})
    with zipfile.ZipFile(path, "a") as archive:
        for name, target in (("a.txt", "../../etc/hostname"), ("b.png", "/etc/passwd"), ("c.txt", "c")):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK if name != "c.txt" else stat.S_IFREG) << 16
            archive.writestr(entry, target)
    prepared = load(path)
    assert [example["text"] for example in prepared.examples] == ["c"]
    assert dict(prepared.counts) == {"no-caption": 1, "link": 2} and prepared.total == 3
    assert {str(problem) for problem in prepared.problems if problem.code == "link"} == {
        "a.txt is a link inside the archive; it was not followed.",
        "Picture 3: b.png is a link inside the archive; it was not followed.",
    }


def test_links_of_a_folder_are_listed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.png").write_bytes(png())
    where = folder(tmp_path / "set", {"a.png": png(), "a.txt": "a", "b.txt": "b"})
    (where / "b.png").symlink_to(tmp_path / "out" / "secret.png")
    (where / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (where / "round.png").symlink_to(where / "round.png")
    (where / "more").symlink_to(tmp_path / "out")
    (where / "same.png").symlink_to(where / "a.png")
    os.mkfifo(where / "pipe.png")
    prepared = load(where)
    assert prepared.kept == 1 and prepared.total == 6
    assert dict(prepared.counts) == {"no-caption": 1, "link": 4, "no-file": 1, "unused-file": 1}
    for name in ("a.png", "a.txt", "b.txt"):
        (where / name).unlink()
    (where / "same.png").unlink()
    with pytest.raises(EmptyError, match=r"holds no picture.*b\.png is a link out of the folder"):
        load(where)


def test_equal_names_count_and_the_last_one_is_used(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for colour in ("red", "green", "blue"):
            archive.writestr("a.png", png(colour))
        archive.writestr("a.txt", "first")
        archive.writestr("a.txt", "second")
    prepared = load(path)
    assert [example["text"] for example in prepared.examples] == ["second"] and prepared.total == 3
    assert open_picture(prepared.examples[0]["image"]).getpixel((0, 0)) == (0, 0, 255)
    assert [(p.severity, p.line) for p in prepared.problems] == [("note", 0), ("skip", 2), ("skip", 3)]
    assert "3 times; the last is used" in prepared.problems[-1].message


def test_an_archive_inside_and_files_that_nothing_is_done_with_are_noted(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"x.png": png()}).read_bytes()
    files: dict[str, bytes | str] = {"a.png": png(), "a.txt": "a", "inner.zip": inner, "photo.heic": b"x", "b.txt": "b"}
    prepared = load(zipped(tmp_path / "set.zip", files))
    assert prepared.kept == prepared.total == 1
    assert {(p.code, p.message.split(" ")[0]) for p in prepared.problems} == {
        ("nested-archive", "inner.zip"), ("unused-file", "photo.heic"), ("unused-file", "b.txt"),
    }  # fmt: skip
    with pytest.raises(EmptyError, match=r"it has \.zip"):
        load(zipped(tmp_path / "only.zip", {"inner.zip": inner}))


def test_damaged_members_are_listed_and_a_damaged_table_of_captions_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    # Other tests of this process may have read longer cells; the limit only grows.
    csv.field_size_limit(131_072)

    def write(files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    def spoil(name: bytes) -> None:
        raw = bytearray(path.read_bytes())
        place = raw.find(name) + len(name)
        raw[place : place + 8] = b"\xff" * 8
        path.write_bytes(bytes(raw))

    words = b"some words that are long enough to be deflated " * 4
    write({"a.png": png(side=32), "a.txt": words, "b.png": png(side=32), "b.txt": words, "c.png": png(), "c.txt": b"c"})
    spoil(b"a.png")
    spoil(b"b.txt")
    prepared = load(path)
    assert [example["text"] for example in prepared.examples] == ["c"] and prepared.total == 3
    assert dict(prepared.counts) == {"picture": 1, "unread-words": 1, "no-caption": 1}
    write({"a.png": png(), "metadata.csv": b"file_name,text\n" + words})
    spoil(b"metadata.csv")
    with pytest.raises(ArchiveError, match=r"metadata\.csv cannot be read"):
        load(path)
    write({"a.png": png(), "metadata.csv": b"file_name,text\na.png," + b"x" * 200_000})
    with pytest.raises(FileError, match=r"metadata\.csv is no csv that can be read"):
        load(path)


def saved(picture: Image.Image, kind: str, **more: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **more)
    return out.getvalue()


def deep_rgb_png() -> bytes:
    """One row of two pixels with 16 bits a colour: (65535, 0, 257 * 128) twice."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">HHH", 65535, 0, 257 * 128) * 2
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **({} if kind == "GIF" else {"lossless": 1}))


STRANGE: dict[str, tuple[bytes, str, tuple[int, int, int]]] = {
    "cmyk.tif": (saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), "cmyk", (255, 0, 0)),
    "deep-grey.png": (saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"), "deep", (155, 155, 155)),
    "deep-rgb.png": (deep_rgb_png(), "deep", (255, 0, 128)),
    "float.tif": (saved(Image.fromarray(np.full((4, 4), 65535.0, np.float32)), "TIFF"), "deep", (255, 255, 255)),
    "moving.gif": (moving("GIF"), "animated", (255, 0, 0)),
    "moving.webp": (moving("WEBP"), "animated", (255, 0, 0)),
    "moving.png": (moving("PNG"), "animated", (255, 0, 0)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_pictures_that_are_converted_are_listed(tmp_path: Path, name: str) -> None:
    raw, code, colour = STRANGE[name]
    prepared = load(zipped(tmp_path / "set.zip", {name: raw, f"{name.rpartition('.')[0]}.txt": "words"}))
    assert prepared.kept == 1 and dict(prepared.counts) == {code: 1} and name in prepared.problems[0].message
    assert open_picture(prepared.examples[0]["image"]).getpixel((0, 0)) == colour


def test_a_gif_of_very_many_frames_is_not_read_to_its_end(tmp_path: Path) -> None:
    two = moving("GIF")
    frame = two[two.find(b"\x21\xf9", two.find(b"\x21\xf9") + 1) : -1]
    (tmp_path / "a.gif").write_bytes(two[:-1] + frame * 1_500_000 + b";")
    (tmp_path / "a.txt").write_text("a")
    started = time.perf_counter()
    assert dict(load(tmp_path).counts) == {"animated": 1}
    assert time.perf_counter() - started < 3


def test_a_picture_of_30000_by_30000_costs_no_memory(tmp_path: Path) -> None:
    """Every pixel is there: 112 MB of bits, 900 million pixels, in a file of 0.1 MB."""
    row = b"\0" * 3751
    squeeze = zlib.compressobj(9)
    body = b"".join(squeeze.compress(row * 1000) for _ in range(30)) + squeeze.flush()
    whole = huge_png()
    start, end = whole.find(b"IDAT") - 4, whole.find(b"IEND") - 4
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    (tmp_path / "a.png").write_bytes(whole[:start] + chunk + whole[end:])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.png").write_bytes(png())
    (tmp_path / "b.txt").write_text("b")
    assert (tmp_path / "a.png").stat().st_size < 200_000
    started = time.perf_counter()
    prepared = load(tmp_path)
    assert time.perf_counter() - started < 2
    assert dict(prepared.counts) == {"picture-too-large": 1} and prepared.kept == 1
    with pytest.raises(DataError, match="far more than the 50,000,000 pixels"):
        open_picture(str(tmp_path / "a.png"))


def test_metadata_of_a_folder_inside_is_noted_where_another_is_used(tmp_path: Path) -> None:
    rows = json.dumps({"file_name": "a.png", "text": "a"})
    files: dict[str, bytes | str] = {"a.png": png(), "metadata.jsonl": rows, "metadata.csv": "file_name,text\na.png,b"}
    prepared = load(folder(tmp_path / "set", files))
    assert prepared.examples[0]["text"] == "a" and dict(prepared.counts) == {"unused-file": 1}
