"""Real text without a download: what every CPython already has on disk.

Three domains, so that one can see whether experts specialise: English (the language reference in
``pydoc_data``), Python (the standard library) and C (CPython's headers, where they are installed).
Tokens are bytes. Another Python holds another text: ``Corpus.sha256`` tells them apart.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
# per domain: enough for a small model not to see a batch twice, small enough to read in a blink
_DOMAIN_BYTES = 600_000
# Of ten blocks in a row the last is held out. Long enough for a window, short enough for the blocks
# of a domain, some 50, to hold the same mixture as the text around them.
_BLOCK = 1024
SPLITS = ("train", "valid", "shifted")


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, in pieces that no window crosses.

    Attributes:
        train, valid: domain name -> (pieces, length) uint8 tensor. The first nine tenths of a
            domain, cut into blocks: every tenth block is held out, so both have one mixture.
        shifted: domain name -> (1, length): the last tenth, held out too, and of another mixture
            (the last modules of a library are not like the others).
    """

    train: dict[str, Tensor]
    valid: dict[str, Tensor]
    shifted: dict[str, Tensor]

    @cached_property
    def sha256(self) -> str:
        """Of all bytes and where they are cut: two corpora with the same are the same."""
        sum_ = hashlib.sha256()
        for split in SPLITS:
            for name, pieces in getattr(self, split).items():
                sum_.update(f"{split} {name} {tuple(pieces.shape)}".encode())
                sum_.update(pieces.numpy().tobytes())
        return sum_.hexdigest()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of ``batch``'s labels."""
        return tuple(self.train)

    def batch(
        self,
        batch_size: int,
        seq_len: int,
        *,
        generator: torch.Generator | None = None,
        split: str = "train",
        domain: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Random windows of text.

        Args:
            batch_size, seq_len: B and N.
            generator: source of randomness; torch's default when None.
            split: "train", "valid" or "shifted".
            domain: only this one; None draws each row's domain evenly.

        Returns:
            tokens (B, N) int64 in [0, 256), and labels (B,) int64, the index of each row's domain.

        Raises:
            ValueError: split or domain is unknown, or seq_len is longer than a domain's pieces.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {SPLITS}")
        if domain is not None and domain not in self.domains:
            raise ValueError(f"domain={domain!r} must be one of {self.domains}")
        texts = list(getattr(self, split).values())
        shortest = min(pieces.shape[1] for pieces in texts)
        if seq_len > shortest:
            raise ValueError(
                f"seq_len={seq_len} must be at most {shortest}, the length of the shortest piece "
                f"of {split} text"
            )
        if domain is None:
            labels_B = torch.randint(len(texts), (batch_size,), generator=generator)
        else:
            labels_B = torch.full((batch_size,), self.domains.index(domain))
        rows = []
        for label in labels_B.tolist():
            pieces = texts[label]
            starts = pieces.shape[1] - seq_len + 1  # of windows within a piece
            drawn = int(torch.randint(len(pieces) * starts, (1,), generator=generator))
            piece, start = divmod(drawn, starts)
            rows.append(pieces[piece, start : start + seq_len])
        return torch.stack(rows).long(), labels_B


def load(source: str | Path = "builtin") -> Corpus:
    """Load text.

    Args:
        source: "builtin" for what CPython ships; a path to a text file or a folder of .txt files
            (one domain per file); or "hf:NAME" for a Hugging Face dataset with a "text" column and
            a "train" split (needs the package datasets).

    Raises:
        ValueError: the path does not exist, or there is too little text in it.
        ImportError: "hf:NAME" without the package datasets.
    """
    source = str(source)
    if source == "builtin":
        texts = {"English": _english(), "Python": _python(), "C": _c_headers()}
        texts = {
            name: text for name, text in texts.items() if text
        }  # a Python without headers has two domains
    elif source.startswith("hf:"):
        try:
            from datasets import load_dataset  # heavy and optional: for the reader who asks for it
        except ImportError as error:
            raise ImportError(
                f"source={source!r} needs the package datasets: pip install datasets"
            ) from error

        rows = load_dataset(source[3:], split="train", streaming=True)
        texts = {source[3:]: _take((row["text"] for row in rows), 3 * _DOMAIN_BYTES)}
    else:
        path = Path(source).expanduser()
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(
                f"source={source!r} must be 'builtin', 'hf:NAME', a text file or a folder of .txt "
                "files"
            )
        texts = {file.stem: file.read_bytes() for file in files}
    return from_texts(texts)


def from_texts(texts: dict[str, bytes]) -> Corpus:
    """A Corpus from domain name -> bytes.

    Raises ValueError when a domain has fewer than 1000 bytes.
    """
    train, valid, shifted = {}, {}, {}
    for name, text in texts.items():
        if len(text) < 1000:
            raise ValueError(f"text {name!r} has {len(text)} bytes, must have at least 1000")
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = len(tokens) * 9 // 10
        tens = max(1, cut // (10 * _BLOCK))  # of blocks; a few bytes are left over
        tens = tokens[: cut // (10 * tens) * (10 * tens)].view(tens, -1)
        block = tens.shape[1] // 10
        train[name], valid[name] = tens[:, :-block].clone(), tens[:, -block:].clone()
        shifted[name] = tokens[cut:].clone().unsqueeze(0)
    return Corpus(train, valid, shifted)


def decode(tokens: Tensor) -> str:
    """(N,) byte tokens -> text; bytes that are not UTF-8 become the replacement sign."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def _take(pieces, limit: int) -> bytes:
    text = bytearray()
    for piece in pieces:
        text += piece if isinstance(piece, bytes) else piece.encode()
        if len(text) >= limit:
            break
    return bytes(text[:limit])


def _english() -> bytes:
    from pydoc_data.topics import topics

    return _take((topics[name] + "\n" for name in sorted(topics)), _DOMAIN_BYTES)


def _python() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    return _take((path.read_bytes() for path in sorted(folder.glob("[a-z]*.py"))), _DOMAIN_BYTES)


def _c_headers() -> bytes:
    folder = Path(sysconfig.get_path("include"))
    return _take((path.read_bytes() for path in sorted(folder.rglob("*.h"))), _DOMAIN_BYTES)
