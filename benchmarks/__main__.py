"""All claims, each in a process of its own, as one table and one picture.

python -m benchmarks            the quick forms: ten minutes, printed
python -m benchmarks --full     an hour or less, for benchmarks/results.md and benchmarks/results.png
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._report import document, draw, load, save

CLAIMS = (
    "elementwise",
    "vectors",
    "matrix_free",
    "banded",
    "parameters",
    "transforms",
    "kepler",
    "tiny_call",
    "calls_of_g",
    "memory",
    "right",
)
HERE = Path(__file__).parent


def run(claim, quick):
    """The rows of one claim; none, with a word on stderr, where it broke."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{claim}", "--json", str(path), *["--quick"] * quick]
        subprocess.run(command, cwd=HERE.parent, stdout=subprocess.DEVNULL, check=False)
        return load(path) if path.exists() else []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ten times as long; writes into benchmarks/")
    parser.add_argument("--json", metavar="PATH", help="write the figures")
    parser.add_argument("--plot", metavar="PATH", help="draw the figures")
    parser.add_argument("--markdown", metavar="PATH", help="write the table")
    parser.add_argument("--only", metavar="CLAIM", nargs="+", choices=CLAIMS, default=CLAIMS)
    options = parser.parse_args(argv)
    found = {claim: run(claim, not options.full) for claim in options.only}
    rows = [row for claim in found.values() for row in claim]
    text = document(rows, "full" if options.full else "quick")
    print(text)
    if options.full:
        options.markdown, options.plot = options.markdown or HERE / "results.md", options.plot or HERE / "results.png"
    if options.markdown:
        Path(options.markdown).write_text(text + "\n")
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        save(rows, options.json)
    broken = [claim for claim, rows in found.items() if not rows]
    if broken:
        sys.exit(f"no figures from {', '.join(broken)}")


if __name__ == "__main__":
    main()
