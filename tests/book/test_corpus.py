"""The corpus: text on every machine, split without overlap into one mixture, drawn by a seed."""

import pytest
import torch

from moe_book import corpus
from moe_book.corpus import decode, from_texts

TINY = {
    "a": bytes(range(10)) * 200,
    "b": bytes(range(100, 150)) * 40,
}  # 2000 bytes each, told apart by their values


def seed(n=0):
    return torch.Generator().manual_seed(n)


def test_the_builtin_corpus_has_english_and_python_without_a_download():
    text = corpus.load()
    assert text.domains[:2] == ("English", "Python") and set(text.domains) <= {
        "English",
        "Python",
        "C",
    }
    for domain in text.domains:
        assert text.train[domain].numel() > 50_000 and text.train[domain].dtype == torch.uint8
    assert "def " in decode(text.train["Python"].flatten()) and "the " in decode(
        text.train["English"].flatten()
    )


def test_the_builtin_corpus_is_the_same_every_time():
    assert corpus.load().sha256 == corpus.load().sha256


def test_held_out_text_has_the_mixture_of_the_training_text_and_the_end_of_a_library_has_another():
    text = corpus.load()
    common = {
        split: torch.cat([pieces.flatten() for pieces in getattr(text, split).values()])
        .bincount(minlength=256)
        .double()
        for split in corpus.SPLITS
    }
    share = {split: counts / counts.sum() for split, counts in common.items()}
    apart = {split: (share[split] - share["train"]).abs().sum() / 2 for split in share}
    assert apart["valid"] < 0.03 and apart["shifted"] > 5 * apart["valid"]


def test_of_ten_blocks_nine_are_for_training_and_the_last_tenth_is_the_shifted_text():
    text = from_texts({"a": bytes(i * i % 251 for i in range(50_000))})
    train, valid, shifted = text.train["a"], text.valid["a"], text.shifted["a"]
    assert (train.shape, valid.shape, shifted.shape) == ((4, 9 * 1125), (4, 1125), (1, 5000))
    whole = torch.cat([torch.cat([train, valid], 1).flatten(), shifted.flatten()])
    assert bytes(whole.tolist()) == bytes(i * i % 251 for i in range(50_000))


def test_the_hash_sees_every_byte_and_every_cut():
    text = from_texts(TINY)
    other = from_texts({**TINY, "b": TINY["b"][:-1] + b"x"})
    moved = corpus.Corpus(text.train, text.shifted, text.valid)
    assert len({text.sha256, other.sha256, moved.sha256}) == 3
    assert from_texts(TINY).sha256 == text.sha256


def test_a_batch_is_windows_of_the_text_with_the_index_of_their_domain():
    text = from_texts(TINY)
    tokens, labels = text.batch(32, 7, generator=seed())
    assert (
        tokens.shape == (32, 7)
        and tokens.dtype == labels.dtype == torch.int64
        and labels.shape == (32,)
    )
    assert set(labels.tolist()) == {0, 1}
    assert torch.equal((tokens >= 100).all(1).long(), labels)
    for row, label in zip(tokens, labels):
        assert bytes(row.tolist()) in TINY[text.domains[label]]


def test_one_domain_can_be_asked_for():
    tokens, labels = from_texts(TINY).batch(8, 7, domain="b", split="valid", generator=seed())
    assert (labels == 1).all() and (tokens >= 100).all()


def test_the_same_seed_draws_the_same_batch_and_another_seed_another():
    text = from_texts(TINY)
    draw = lambda n: text.batch(8, 50, generator=seed(n))[0]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_a_window_may_be_as_long_as_a_piece_and_reach_its_end():
    text = from_texts({"a": bytes(range(250)) * 4})
    assert torch.equal(text.batch(1, 810)[0], text.train["a"].long())
    ends = text.batch(4000, 809, generator=seed())[0][:, -1]
    assert set(ends.tolist()) == {58, 59}  # both windows are drawn


def test_no_window_crosses_from_one_piece_into_the_next():
    pieces = torch.arange(12, dtype=torch.uint8).view(3, 4)
    text = corpus.Corpus({"a": pieces}, {"a": pieces}, {"a": pieces})
    seen = {tuple(row) for row in text.batch(500, 3, generator=seed())[0].tolist()}
    assert seen == {(4 * i + j, 4 * i + j + 1, 4 * i + j + 2) for i in range(3) for j in range(2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split='test' must be one of \('train', 'valid', 'shifted'\)"),
        ({"domain": "C"}, r"domain='C' must be one of \('a', 'b'\)"),
        ({"seq_len": 1621}, "seq_len=1621 must be at most 1620, the length of the shortest piece"),
        ({"seq_len": 181, "split": "valid"}, "seq_len=181 must be at most 180"),
    ],
)
def test_a_batch_that_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_texts(TINY).batch(**{"batch_size": 2, "seq_len": 8, **arguments})


def test_a_text_too_short_is_refused():
    with pytest.raises(ValueError, match="text 'a' has 999 bytes, must have at least 1000"):
        from_texts({"a": b"x" * 999})


def test_a_file_or_a_folder_of_ones_own_can_be_loaded(tmp_path):
    for name, text in TINY.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    assert corpus.load(str(tmp_path)).domains == ("a", "b")
    assert corpus.load(str(tmp_path / "b.txt")).domains == ("b",)


@pytest.mark.parametrize("source", ["no/such/file.txt", "."])
def test_a_source_without_text_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be 'builtin', 'hf:NAME', a text file or a folder"):
        corpus.load(source)


def test_bytes_that_are_not_text_are_shown_as_the_replacement_sign():
    assert decode(torch.tensor(list("né".encode()) + [255])) == "né\ufffd"
