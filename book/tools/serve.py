"""Serve the built book to this machine only: `python serve.py _build/html 8000`."""

import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing about each request, and has the browser ask again for pages that were rebuilt."""

    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


class Loopback(ThreadingHTTPServer):
    daemon_threads = True
    # Off on Windows, where the option would let two servers share a port; on elsewhere, so that a restart need not wait.
    allow_reuse_address = sys.platform != "win32"


def main(directory: str, port: str) -> None:
    try:
        server = Loopback(("127.0.0.1", int(port)), functools.partial(Quiet, directory=directory))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Cannot serve at port {port} ({error}). Choose another: make book PORT=8001")
    print(f"The book is at http://127.0.0.1:{port}   (Ctrl-C stops)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
