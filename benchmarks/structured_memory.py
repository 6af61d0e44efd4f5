"""Peak memory of what scores units, beside plain inference on the same windows: each in a process of its own.

    python -m benchmarks.structured_memory [--windows 4 --window 128]

Prints the peak resident size (Linux, VmHWM) after the weights are loaded and after the work.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from demo.assets import model_dir

WORK = {
    "plain inference": "import topiarist.evaluation.perplexity as e; e.perplexity(model, tokens, batch_size=windows)",
    "policy-gradient": "PolicyGradient(steps=3, windows=windows, window=window, init='constant', held_out=windows,"
    " evaluations=1).scores(task)",
    "taylor": "Taylor(num_windows=2, window_tokens=window).scores(task)",
    "taylor, pooled": "Taylor(num_windows=2, window_tokens=window, pooled=True).scores(task)",
    "flap": "Flap().scores(task)",
}
CHILD = """
import sys, torch
from pathlib import Path
from topiarist.evaluation.perplexity import load_model
from topiarist.structured import Task, units_of
from topiarist.structured.taylor import Taylor
from topiarist.structured.metrics import Flap
from topiarist.structured.policy_search import PolicyGradient
torch.set_num_threads(1)
folder, windows, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))
model = load_model(folder).requires_grad_(False)
tokens = torch.randint(model.config.vocab_size, (4 * windows, window), generator=torch.Generator().manual_seed(0))
task = Task(model, units_of(model, ("kv_groups", "channels")), tokens, 0.8, batch_size=windows)
loaded = peak()
{work}
print(loaded, peak())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4, help="windows a forward")
    parser.add_argument("--window", type=int, default=128)
    options = parser.parse_args()
    print("| work | loaded, GB | peak, GB | over loaded, GB |\n|---|---|---|---|")
    for name, work in WORK.items():
        command = [sys.executable, "-c", CHILD.replace("{work}", work), model_dir(), options.windows, options.window]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        loaded, peak = map(float, done.stdout.split())
        print(f"| {name} | {loaded:.2f} | {peak:.2f} | {peak - loaded:.2f} |", flush=True)


if __name__ == "__main__":
    main()
