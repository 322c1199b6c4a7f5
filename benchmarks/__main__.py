"""Every benchmark in turn, each in a process of its own: `python -m benchmarks`, or some of them by name."""

import subprocess
import sys

EACH = ("overhead", "splicing", "attribution", "edges", "contributions", "bases", "bind")


def main(names: list[str]) -> int:
    """Run the benchmarks named, all by default; 1 if a figure of any is over its limit."""
    unknown = [name for name in names if name not in EACH]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(EACH)}", file=sys.stderr)
        return 2
    codes = [subprocess.call([sys.executable, "-m", f"benchmarks.{name}"]) for name in names or EACH]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
