#!/bin/sh
# Print the first Python that can run the book. 3.11 to 3.13 are what the pinned set was tried with; a newer one is a last resort.
if [ -n "$PYTHON" ]; then
    set -- "$PYTHON" # a path may hold a space
else
    set -- python3 python3.13 python3.12 python3.11 python
fi
for newest in 13 99; do
    for python in "$@"; do
        if "$python" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; then
            command -v "$python"
            exit 0
        fi
    done
done
echo "The book needs Python 3.11 or newer, and none was found${PYTHON:+ (PYTHON=$PYTHON)}." >&2
echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python@3.12)," >&2
echo "or name the one to use: make book PYTHON=/path/to/python3.12" >&2
exit 1
