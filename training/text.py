"""Text as a data set: files split by a hash of their names, tokens memory-mapped, random windows.

Tokens are bytes, or those of a file of the package `tokenizers`. They are written once to a folder
below `$XDG_CACHE_HOME/twa` (`~/.cache/twa` if unset), which may be removed at any time.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import models
from training import data
from training.flags import TEXT as NAME
from training.settings import Settings, derived, flag, free
from twa.files.writing import replacing
from utils import UserError, make_directory

# The parts, and up to which share of the files, in the order of their hashes, each one reaches.
PARTS = {"test": 0.025, "validation": 0.05, "train": 1.0}
# Not modules of the library, or as `pydoc_data` no program text: one file of 0.75 MB of prose.
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}


@dataclass(kw_only=True)
class TextSettings(Settings):
    """text"""

    tokenizer: str | None = free(
        None,
        "file of the package tokenizers, tokenizer.json (default: none, tokens are bytes)",
        metavar="FILE",
    )
    context: int = flag(128, "number of tokens that the model sees", low=1)
    vocabulary: str | None = derived(free=False)

    def check(self):
        if self.datasets == NAME:
            if self.data_dir == type(self).data_dir:  # the folder of other data sets
                self.data_dir = None
            self.vocabulary = Vocabulary.read(self.tokenizer).name


@dataclass(frozen=True)
class Vocabulary:
    """What text is cut into: bytes, or the tokens of a tokenizer.

    Attributes:
        size: how many tokens there are.
        name: "bytes", or the hash of the tokenizer's file, which identifies the vocabulary.
        tokenizer: of the package `tokenizers`; None for bytes.
    """

    size: int = 256
    name: str = "bytes"
    tokenizer: object = None

    @classmethod
    def read(cls, path: str | Path | None) -> Vocabulary:
        """The vocabulary of the tokenizer's file `path`; bytes if None.

        Raises:
            UserError: the file is no tokenizer, or the package is not installed.
        """
        if path is None:
            return cls()
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("--tokenizer: the package is missing; pip install tokenizers") from None
        try:
            content = Path(path).read_bytes()
            tokenizer = Tokenizer.from_buffer(content)
        except OSError as error:
            raise UserError(f"--tokenizer {path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # the package has no type of its own
            reason = " ".join(str(error).split())
            raise UserError(f"--tokenizer {path}: is no tokenizer's file ({reason})") from None
        digest = hashlib.sha256(content).hexdigest()[:16]
        return cls(tokenizer.get_vocab_size(with_added_tokens=True), digest, tokenizer)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest that holds every token."""
        return np.min_scalar_type(self.size - 1).type

    def encode(self, content: bytes, path: Path) -> np.ndarray:
        """The tokens of a content; a `UserError` if a tokenizer is given and it is not UTF-8."""
        if self.tokenizer is None:
            return np.frombuffer(content, np.uint8)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: is not text in UTF-8 (byte {error.start}); remove it, or leave out "
                "--tokenizer: bytes take anything"
            ) from None
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)

    def decode(self, tokens: list[int]) -> str:
        """The text of these tokens; bytes that are no UTF-8 become replacement characters."""
        if self.tokenizer is None:
            return bytes(tokens).decode("utf-8", errors="replace")
        return self.tokenizer.decode(tokens)


@dataclass(frozen=True)
class Spec:
    """The constants of a text data set."""

    vocabulary: Vocabulary
    context: int
    name: str = NAME
    content: str | None = None  # identifies the text, wherever it lies

    def model(self, arch: str) -> nn.Module:
        """A freshly initialised model for this text; see `models.gpt.build`."""
        return models.gpt.build(arch, self.vocabulary.size, self.context)


@dataclass(frozen=True)
class Split:
    """A part of a text: to train on, to validate or to test.

    Attributes:
        tokens: unsigned integers [N], memory-mapped.
        size: bytes of the text that they stand for.
    """

    tokens: np.ndarray
    size: int
    spec: Spec

    def __len__(self) -> int:
        """The number of whole windows that follow each other without overlap."""
        return (len(self.tokens) - 1) // self.spec.context


def load(
    data_dir: str | Path | None, vocabulary: Vocabulary, context: int
) -> tuple[Split, Split, Split]:
    """The parts of a text: to train on, to validate and to test.

    Of a folder, every file goes into one of them by a hash of its name: into the test part with
    probability 0.025, into the validation part with 0.025. A single file is cut into them, in the
    reverse order.

    Args:
        data_dir: a file, or a folder whose files, at any depth, are the text, but for hidden ones;
            None: the modules of Python's standard library.
        context: tokens that a model sees at once.

    Raises:
        UserError: the text is not there, empty, too short for one context in each part, or it is
            not UTF-8 where a tokenizer is given.
    """
    root, files = _files(data_dir)
    folder = _prepared(root, files, vocabulary)
    sizes = {part: int((folder / f"{part}.size").read_text()) for part in PARTS}
    content = f"of {sum(sizes.values())} bytes, SHA-256 {(folder / 'complete').read_text()}"
    spec = Spec(vocabulary, context, content=content)
    splits = {}
    for part, size in sizes.items():
        path = folder / f"{part}.tokens"
        count = path.stat().st_size // np.dtype(vocabulary.dtype).itemsize
        if count <= context:
            raise UserError(
                f"{root}: its {part} part has {count} tokens ({len(files)} files, by a hash of "
                f"their names), and one context has {context} + 1; give more text"
                + (", or one file, which is cut into parts" if len(files) > 1 else "")
            )
        tokens = np.memmap(path, vocabulary.dtype, "r", shape=(count,))
        splits[part] = Split(tokens, size, spec)
    return splits["train"], splits["validation"], splits["test"]


def _files(data_dir: str | Path | None) -> tuple[Path, list[Path]]:
    """The root of the text, and its files in the order of their names."""
    library = data_dir is None
    root = Path(sysconfig.get_path("stdlib") if library else data_dir).expanduser()
    if root.is_file():
        return root, [root]
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such file or folder")

    def belongs(path: Path) -> bool:
        folders = path.relative_to(root).parts
        unwanted = _NOT_THE_LIBRARY if library else ()
        return path.is_file() and not any(f.startswith(".") or f in unwanted for f in folders)

    files = sorted(filter(belongs, root.rglob("*.py" if library else "*")))
    if not files:
        raise UserError(f"--data-dir {root}: holds no files")
    return root, files


def _prepared(root: Path, files: list[Path], vocabulary: Vocabulary) -> Path:
    """The folder with the tokens of each part, which are written unless it has them."""
    stats = [(str(path.relative_to(root)), path.stat()) for path in files]
    # "hash": the folders of earlier versions lack the text's.
    key = [str(root.resolve()), vocabulary.name, PARTS, "hash"]
    key += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twa"
    folder = cache / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    if (folder / "complete").exists():
        return folder
    make_directory(folder)
    pieces: dict[str, list[tuple[Path, slice]]] = {part: [] for part in PARTS}
    if len(files) == 1:
        content = files[0].read_bytes()
        if not content:
            raise UserError(f"{root}: is empty")
        # A cut inside a character would leave two pieces that are not UTF-8.
        cuts = (round(len(content) * (1 - share)) for share in (0, *PARTS.values()))
        edges = [_start_of_character(content, cut) for cut in cuts]
        for part, high, low in zip(PARTS, edges, edges[1:], strict=False):
            pieces[part].append((files[0], slice(low, high)))
    else:
        for path in files:
            name = path.relative_to(root).as_posix()
            pieces[part_of(name)].append((path, slice(None)))
    digest = hashlib.sha256()
    for part, of_part in pieces.items():
        size = 0
        with replacing(folder / f"{part}.tokens") as temporary, open(temporary, "wb") as out:
            for path, piece in of_part:
                content = path.read_bytes()[piece]
                out.write(vocabulary.encode(content, path).tobytes())
                digest.update(content)
                size += len(content)
        with replacing(folder / f"{part}.size") as temporary:
            temporary.write_text(str(size))
    with replacing(folder / "complete") as temporary:
        temporary.write_text(digest.hexdigest()[:16])
    return folder


def _start_of_character(content: bytes, edge: int) -> int:
    """`edge`, or the place before it where its UTF-8 character begins."""
    while 0 < edge < len(content) and content[edge] & 0xC0 == 0x80:
        edge -= 1
    return edge


def part_of(name: str) -> str:
    """The part that a file of this name, relative to the text's folder, belongs to."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(part for part, end in PARTS.items() if share < end)


@dataclass(eq=False, kw_only=True)
class Loader(data.Loader):
    """Iterates over a text in batches: (tokens int64 [B, T], the next tokens int64 [B · T]).

    For training, a window is T + 1 tokens from a random place on; otherwise the windows follow each
    other, and a rest that fills none is dropped. Batch k of an epoch depends on the seed, the epoch
    and k alone. With several ranks, each gets its own part of every batch.

    Attributes:
        split: the text.
        batch_size: windows in a batch, on all ranks together.
        train: whether windows are drawn at random.
        device: where the batches go.
        steps: batches of an epoch, if `train`; None: so many that they have the text's length.
        count: windows in an epoch: what images are to other data.
    """

    device: torch.device
    steps: int | None = None
    sample: ClassVar[int] = 256  # windows have many labels each

    def __post_init__(self):
        self.epoch, self.count, self.skipped = 0, len(self.split), set()
        if self.train:
            self.count = (self.steps or len(self)) * self.batch_size

    def labels_in(self, batch: int) -> int:
        return self.images_in(batch) * self.split.spec.context

    def measures(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of text: loss in nats per token, bits per byte, perplexity."""
        loss = metrics["loss"]
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = loss * (len(self.split.tokens) / self.split.size / math.log(2))
        return {"loss": loss, "bits_a_byte": bits, "perplexity": perplexity}

    def _load(self, parts: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        context = self.split.spec.context
        starts = np.arange(len(self.split)) * context
        if self.train:
            draws = data.generator(f"{self.seed}/{self.epoch}")
            last = len(self.split.tokens) - context
            starts = torch.randint(last, (self.count,), generator=draws).numpy()
        for part in parts:
            places = starts[part, None] + np.arange(context + 1)
            windows = torch.from_numpy(self.split.tokens[places].astype(np.int64))
            if self.device.type not in ("cpu", "mps"):  # so that the copy does not wait
                windows = windows.pin_memory()
            windows = windows.to(self.device, non_blocking=True)
            yield windows[:, :-1], windows[:, 1:].flatten()
