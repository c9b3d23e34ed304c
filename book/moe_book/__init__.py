"""moe_book: what the chapters share. Explorer and figures, the corpus, the training loop, stored runs, exercise checkers."""

from .setup import Book, setup

__all__ = ["Book", "setup"]
