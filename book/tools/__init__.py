"""What makes the book: the environment, the notebooks' form, the repository's URL, the browser for the tests, the local server."""
