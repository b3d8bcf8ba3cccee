"""The demo's figures as a result file.

python benchmarks/demo.py [--out benchmarks/results/demo.json]
"""

import argparse
from pathlib import Path

from lorakit.cli.demo import run
from lorakit.config.verbs import DemoConfig
from measured import begin, write_result


def main() -> None:
    """Run the demo, print its table, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    out = parser.parse_args().out
    result = begin(out)
    found = run(DemoConfig())
    print(found.text)
    result |= {name: value for name, value in found.data.items() if name != "out"}
    write_result(out, result)


if __name__ == "__main__":
    main()
