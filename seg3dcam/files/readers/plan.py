"""What a header says about its voxels, and how voxels of all formats are read."""

from __future__ import annotations

import itertools
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError, Seg3dcamError

__all__ = [
    "Decompressor",
    "Plan",
    "channels_first",
    "check_file",
    "check_length",
    "not_real",
    "read_start",
    "read_voxels",
    "reading",
    "refuse_empty_grid",
]

SLAB_VOXELS = 2**21
_BEST_RATIO = 1032  # deflate cannot compress better than this
_PIECE = 2**20
_MOST_BEHIND = 2**24
_MAGIC = b"\x1f\x8b"  # of gzip
_GZIP, _ZLIB_OR_GZIP = 31, 47  # zlib's `wbits`; MetaImage files may hold either

Packing = Literal["plain", "gzip", "zlib"]


@dataclass(frozen=True)
class Plan:
    """What a file's header says about its voxels.

    - `shape`: (C, X, Y, Z); in the file x runs fastest, then y, z and C.
    - `affine`: (4, 4) voxel -> RAS mm.
    - `dtype`: the type of the voxels in the file.
    - `header`: the header of a NIfTI file, None for other formats.
    - `voxels`: the file that holds the voxels, None if it is `path` itself.
    - `start`: the byte at which the voxels, or their compressed data, start.
    - `packing`: how the voxels are compressed.
    - `skip`: how many uncompressed bytes come before the voxels.
    - `slope`, `intercept`: a stored value times the slope, plus the intercept, is the true value.
    - `segments`: whether the file says that it is a segmentation.
    """

    path: Path
    shape: tuple[int, int, int, int]
    affine: npt.NDArray[np.float64]
    dtype: np.dtype
    header: nib.Nifti1Header | None = None
    voxels: Path | None = None
    start: int = 0
    packing: Packing = "plain"
    skip: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    segments: bool = False

    @property
    def voxel_bytes(self) -> int:
        """Size of the uncompressed voxels in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# ------------------------------------------------------------------------------------ boundary


@contextmanager
def reading(path: Path, kind: str = "file") -> Iterator[None]:
    """Turn any error while a file is read into a `ScanError` that names the file.

    On damaged files, libraries may raise exceptions of any type.
    """
    try:
        yield
    except (Seg3dcamError, Warning):  # the caller may have turned warnings into errors
        raise
    except FileNotFoundError as error:
        raise ScanError(
            f"{path}: there is no such file. Check the spelling and the folder. Legal: a file "
            "(.nii, .nii.gz, .nrrd, .mha, .mgz and others), a list of them, one per channel, or "
            "the folder of one DICOM series."
        ) from error
    except (EOFError, zlib.error) as error:
        raise ScanError(
            f"{path}: the compressed file is damaged or cut short ({error}). Copy or download it "
            "again; `gzip -t` tests it."
        ) from error
    except OSError as error:
        raise ScanError(
            f"{path}: the file cannot be read ({error.strerror or error}). Check its permissions "
            "and the disk."
        ) from error
    except MemoryError as error:
        raise ScanError(
            f"{path}: the scan does not fit into memory. Crop it, or use a machine with more."
        ) from error
    except Exception as error:
        if "null byte" in str(error) or "null character" in str(error):
            raise ScanError(f"{str(path)!r}: a path must not hold the character NUL.") from error
        raise ScanError(
            f"{path}: damaged, no {kind} that can be used ({type(error).__name__}: {error}). Copy "
            "it again, or write it again with the program that made it."
        ) from error


def check_file(path: Path) -> None:
    """Refuse anything but a regular file, such as a folder or a pipe."""
    with reading(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ScanError(
                f"{path} is a folder. Legal here: one .nii or .nii.gz file, or a list of them, one "
                "per channel. Name the files; a DICOM folder is given alone, as a scan."
            )
        if not stat.S_ISREG(mode):
            raise ScanError(f"{path} is no regular file. Legal: a file on a disk.")


def read_start(path: Path, size: int) -> tuple[bytes, bool]:
    """Return the first bytes of a file, uncompressed, and whether the file is gzipped.

    This is decided by the content, so a wrong suffix does no harm.
    """
    with reading(path), path.open("rb") as file:
        zipped = file.read(len(_MAGIC)) == _MAGIC
        file.seek(0)
        return (Decompressor(file) if zipped else file).read(size), zipped


# --------------------------------------------------------------------------------------- checks


def not_real(name: str, found: str) -> ScanError:
    """Return the error for voxels that are not real numbers."""
    return ScanError(
        f"{name}: the voxels are {found}. Legal: integers or real floating point numbers. "
        "Save the magnitude, or one grey channel, and load that."
    )


def refuse_empty_grid(shape: tuple[int, ...], name: str) -> None:
    """Refuse a volume without voxels."""
    if min(shape) < 1:
        raise ScanError(
            f"{name}: the volume has no voxels, shape {shape}. Every axis must have at least 1: "
            "check how the file was cropped."
        )


def channels_first(found: Sequence[int], path: Path) -> tuple[int, int, int, int]:
    """Return the shape (C, X, Y, Z) for one with channels last; raise ScanError for 2-D and 5-D."""
    shape = found = tuple(int(size) for size in found)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3:
        raise ScanError(
            f"{path}: the image is {len(shape)}-D, shape {found}. Legal: (X, Y, Z), or (X, Y, Z, C)"
            " with channels last. Join the slices to one volume; a single slice has shape "
            "(X, Y, 1)."
        )
    if len(shape) > 4:
        raise ScanError(
            f"{path}: the image is {len(shape)}-D, shape {found}. Legal: (X, Y, Z), or (X, Y, Z, C)"
            " with channels last. Split it into one file per case; a vector image has its channels "
            "on axis 5 and a 1 on axis 4, which is to be dropped."
        )
    refuse_empty_grid(shape, str(path))
    x, y, z, *channels = shape
    return (*channels, x, y, z) if channels else (1, x, y, z)  # type: ignore[return-value]


def check_length(plan: Plan) -> None:
    """Refuse a file that is too short, before memory is allocated for its voxels."""
    path = plan.voxels or plan.path
    check_file(path)
    with reading(path), path.open("rb") as file:
        there = max(os.fstat(file.fileno()).st_size - plan.start, 0)
    most = there if plan.packing == "plain" else there * _BEST_RATIO
    if most < plan.skip + plan.voxel_bytes:
        raise _cut_short(plan, f"at most {max(most - plan.skip, 0)}")


def _cut_short(plan: Plan, found: str) -> ScanError:
    return ScanError(
        f"{plan.voxels or plan.path}: the file is cut short: it holds {found} of the "
        f"{plan.voxel_bytes} bytes of voxels that its header announces. Copy or download it again."
    )


# --------------------------------------------------------------------------------------- voxels


def read_voxels(plan: Plan, out: npt.NDArray[np.float32]) -> None:
    """Read the voxels into `out`, (C, X, Y, Z), slab by slab along z."""
    channels, x, y, z = plan.shape
    depth = max(1, SLAB_VOXELS // (x * y))
    scaled = (plan.slope, plan.intercept) != (1.0, 0.0)
    with _stream(plan) as stream:
        read = 0
        for channel, start in itertools.product(range(channels), range(0, z, depth)):
            stop = min(start + depth, z)
            wanted = x * y * (stop - start) * plan.dtype.itemsize
            raw = stream.read(wanted)
            read += len(raw)
            if len(raw) < wanted:
                raise _cut_short(plan, str(read))
            slab = np.frombuffer(raw, plan.dtype).reshape((x, y, stop - start), order="F")
            with np.errstate(over="ignore", invalid="ignore"):  # refused later, as infinity
                # The scaling is done in float64, for one slab at a time.
                out[channel, :, :, start:stop] = (
                    slab.astype(np.float64) * plan.slope + plan.intercept if scaled else slab
                )
        if plan.packing != "plain":
            # Read on to the end to check the checksum, with a limit: a small file can unpack to
            # terabytes.
            _pass_over(stream, _MOST_BEHIND)


@contextmanager
def _stream(plan: Plan) -> Iterator[BinaryIO]:
    """Open the file of the voxels and yield a stream that starts at them, uncompressed."""
    path = plan.voxels or plan.path
    with reading(path), path.open("rb") as file:
        file.seek(plan.start)
        if plan.packing == "plain":
            file.seek(plan.skip, os.SEEK_CUR)
            yield file
        else:
            stream = cast(BinaryIO, Decompressor(file, members=plan.packing == "gzip"))
            _pass_over(stream, plan.skip)
            yield stream


def _pass_over(stream: BinaryIO, size: int) -> None:
    """Skip up to `size` bytes."""
    while size > 0 and (passed := len(stream.read(min(size, _PIECE)))):
        size -= passed


class Decompressor:
    """Reads the uncompressed bytes of a gzip file, or of one zlib stream.

    zlib checks the checksum at the end of a stream. Another gzip member may follow. Anything else
    that follows is ignored, as zlib's own reader of files and ITK do.
    """

    def __init__(self, file: BinaryIO, *, members: bool = True) -> None:
        self._file, self._members = file, members
        self._inflate = zlib.decompressobj(_GZIP if members else _ZLIB_OR_GZIP)
        self._packed = b""

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end; raise EOFError if the data end too early."""
        pieces: list[bytes] = []
        while size and (not self._inflate.eof or self._goes_on()):
            packed = self._packed or self._file.read(_PIECE // 16)
            piece = self._inflate.decompress(packed, size)
            if not packed and not piece:
                raise EOFError("the packed data end before their end is marked")
            self._packed = self._inflate.unconsumed_tail
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _goes_on(self) -> bool:
        """Tell whether another gzip member follows one that ended, and begin to read it."""
        rest = self._inflate.unused_data
        if len(rest) < len(_MAGIC):
            rest += self._file.read(_PIECE // 16)
        if not self._members or not rest.startswith(_MAGIC):
            return False
        self._inflate, self._packed = zlib.decompressobj(_GZIP), rest
        return True
