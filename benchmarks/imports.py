"""How long `import condiff_ref` takes beyond torch itself, as whole processes in turn. Prints the medians of ten."""

import statistics
import subprocess
import sys
import time

MODULES = "schedules, predictions, denoisers, guidance, samplers, mixture, unet, classifier, train, data, metrics, cost"


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    cases = {
        "torch": "import torch",
        "condiff_ref": "import torch, condiff_ref",
        "all of it": f"import torch; from condiff_ref import {MODULES}",
    }
    runs = {name: [] for name in cases}
    for _ in range(10):  # in turn, so that a busy moment hits all alike
        for name, code in cases.items():
            runs[name].append(seconds(code))
    base = statistics.median(runs["torch"])
    for name, times in runs.items():
        print(f"{name}: {statistics.median(times):.2f} s, {statistics.median(times) - base:+.2f} s beyond torch")


if __name__ == "__main__":
    main()
