"""What trees of images have in common, however their classes are found: files that count, and folders of splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from pcenet.choices import Split
from pcenet.data.base import Fault
from pcenet.reading import is_text

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Images that are not read. They stop training, because they would be missed; any other file is passed over with a note.
UNREAD_SUFFIXES = (
    *(".apng", ".avif", ".dib", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jpe", ".jpx", ".jxl", ".mpo", ".pbm"),
    *(".pcx", ".pnm", ".psd", ".svg", ".tga", ".xcf"),
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
    *(".dcm", ".dicom", ".exr", ".hdr", ".nii", ".nii.gz", ".npy", ".npz"),
)
_WORDS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# Names of the folder of a split, in lower case: each word, and with "set", "data" or "images" behind it.
SPLIT_FOLDERS: Mapping[str, Split] = {
    f"{word}{end}": split
    for split, words in _WORDS.items()
    for word in words
    for end in ("", *(f"{sign}{what}" for sign in ("", "_", "-", " ") for what in ("set", "data", "images")))
}
# Those that name a split even where there is no other: any folder around a set may be called "dev" or "testing".
PLAIN_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
# Folders of images with masks in names of their own: refused as classes, and hinted at in segmentation.
IMAGE_WORDS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
MASK_WORDS = frozenset(
    {"masks", "mask", "labels", "label", "annotations", "annotation", "gt", "groundtruth", "segmentationclass"}
)

Parts = tuple[str, ...]  # a path from the root of the tree; that of a folder ends in ""


def data_paths(names: Iterable[str], faults: list[Fault]) -> list[Parts]:
    """The names that count, in parts.

    An archive among them is a fault, since it is not looked into, and so is an image whose name, or folder's name, is
    no text: reports and checkpoints could not name it.
    """
    paths = []
    strange: dict[Parts, Fault] = {}
    for name in names:
        path = tuple(name.split("/"))
        if _is_archive(path):
            text = (
                f"'{name}' is an archive inside the data set and is not opened. Unpack it there, or move it elsewhere."
            )
            faults.append(Fault(name, text))
            continue
        paths.append(path)
        if is_image(path) and not is_text(name):
            end = next(index for index, part in enumerate(path, 1) if not is_text(part))
            file = "/".join(path[:end])
            seen = file.encode(errors="backslashreplace").decode()
            text = f"the name '{seen}' is no valid Unicode (UTF-8), as names from other systems may be. Rename it."
            strange.setdefault(path[:end], Fault(file, text))
    faults += strange.values()
    if not strange:
        return paths
    return [path for path in paths if not any(path[:end] in strange for end in range(1, len(path) + 1))]


def is_image(path: Parts) -> bool:
    """Whether a file is named like an image."""
    return path[-1].lower().endswith(IMAGE_SUFFIXES)


def is_unread(path: Parts) -> bool:
    """Whether a file is named like an image in a format that is not read."""
    return path[-1].lower().endswith(UNREAD_SUFFIXES)


def split_roots(paths: list[Parts], folders: list[Parts], faults: list[Fault]) -> dict[Split, Parts]:
    """The folder of each split out of ``folders``; two for one split, or an image beside them, are faults."""
    roots: dict[Split, Parts] = {}
    for split in get_args(Split):
        same = [folder for folder in folders if SPLIT_FOLDERS[folder[-1].lower()] == split]
        if len(same) > 1:
            faults.append(Fault(same[1][-1], f"the folders {names_of(same)} all mean '{split}'. Keep one of them."))
        if same:
            roots[split] = same[0]
    for path in (path for path in paths if is_image(path) and path[: len(folders[0])] not in folders):
        name = "/".join(path)
        text = f"'{name}' lies beside the split folders {names_of(folders)}. Move it into one of them, or remove it."
        faults.append(Fault(name, text))
    return roots


def split_notes(roots: Mapping[Split, Parts]) -> list[Fault]:
    """What is said of split folders that are not called train, val and test: one note, or none."""
    read = [f"'{root[-1]}' as {split}" for split, root in roots.items() if root[-1].lower() != split]
    return [Fault("", f"folders are read as splits by their names: {', '.join(read)}.")] if read else []


def left_out(files: list[str], where: str) -> list[Fault]:
    """One note on the files that were passed over in folders of images, or none."""
    if not files:
        return []
    first = min(files)
    text = (
        f"{len(files)} file(s) in {where} are not named like images and are left out, the first '{first}'. Images end"
        f" in {', '.join(IMAGE_SUFFIXES)}."
    )
    return [Fault(first, text)]


def unread_format(name: str) -> Fault:
    """The fault of an image in a format that is not read."""
    suffix = next(suffix for suffix in UNREAD_SUFFIXES if name.lower().endswith(suffix))
    return Fault(
        name,
        f"'{name}' looks like an image, but {suffix} files are not read: only those that end in"
        f" {', '.join(IMAGE_SUFFIXES)}. Convert it, or move it elsewhere.",
    )


def _is_archive(path: Parts) -> bool:
    return path[-1].lower().endswith(".zip")


def names_of(paths: Iterable[Parts]) -> str:
    """The names of folders, as a message has them."""
    return ", ".join(f"'{path[-1]}'" for path in paths)
