"""The demo's figures as a result file.

python benchmarks/demo.py
"""

from lorakit.cli.demo import DemoConfig, run
from measured import environment, write_result


def main() -> None:
    """Run the demo, print its table, write benchmarks/results/demo.json."""
    result = environment()
    found = run(DemoConfig())
    print(found.text)
    result |= {name: value for name, value in found.data.items() if name != "out"}
    print(f"written to {write_result('demo', result).name}")


if __name__ == "__main__":
    main()
