"""The pages in a real browser, wide and as on a phone, light and dark: not blank, and nothing sticks out of the window.

TOPIARIST_SCREENSHOTS=folder keeps the pictures, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from test_report import BENCH, layer, result

from topiarist.results.pages import Result, compare_page, report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

# Every box must end inside the window; what scrolls within a box of its own is allowed to be wider than that box.
MEASURE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.clientWidth, out = [];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    const scrolls = e.closest(".scroll") && !e.classList.contains("scroll");
    if (!scrolls && box.width && (box.right > wide + 1 || box.left < -1)) out.push(e.outerHTML.slice(0, 120));
  }
  const seen = {wide, out, whole: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight};
  parent.postMessage(seen, "*");
});
</script>
"""
FRAME = """
<!doctype html><body style="margin:0">
<script>addEventListener("message", e => document.body.dataset.seen = JSON.stringify(e.data));</script>
<iframe src="page.html" width="{width}" height="{height}" style="border:0"></iframe>
"""


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser on frame.html with a profile of its own; returns what it prints."""
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(
        [*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def look(html: str, folder: Path, width: int, *, dark: bool = False) -> tuple[dict, Path]:
    """What the page measures at a window of `width` pixels, and a picture of all of it."""
    folder.mkdir(parents=True)
    if dark:
        html = html.replace("<html", '<html style="color-scheme: dark"', 1)
    (folder / "page.html").write_text(html.replace("</body>", MEASURE + "</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width, height=900))
    printed = browse(folder, f"--window-size={max(width, 500)},900", "--dump-dom", "--virtual-time-budget=2000")
    found = re.search(r'data-seen="([^"]*)"', printed)
    assert found, "the page did not load"
    seen = json.loads(unescape(found[1]))
    picture = folder / "page.png"
    (folder / "frame.html").write_text(FRAME.format(width=width, height=seen["high"]))
    browse(folder, f"--window-size={width},{seen['high']}", f"--screenshot={picture}")
    if keep := os.environ.get("TOPIARIST_SCREENSHOTS"):
        shutil.copy(picture, Path(keep) / f"{folder.name}.png")
    return seen, picture


def full_result(folder: Path | None = None) -> Result:
    """A result with everything in it: 24 blocks, long names, refinement, warnings, measurements."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    layers = [
        layer(f"model.layers.{block}.{kind}", 0.001 * (1 + block) ** (1 + i / 4), 0.5 + 0.02 * (block % 3))
        for block in range(24)
        for i, kind in enumerate(kinds)
    ]
    refined = [
        {"name": f"b{i}", "before": 0.1 + i / 50, "after": 0.05 + i / 60, "best_epoch": i % 4} for i in range(24)
    ]
    texts = [("heldout_with_quite_a_long_name.jsonl", 31.2), ("wikitext2.test.raw", 1.5e7)]
    perplexity = [
        {"text": text, "digest": text, "window": 1024, "tokens": 10**6, "dtype": "bfloat16", "value": value,
         "dense": {"model": "base", "value": value / 2}}
        for text, value in texts
    ]  # fmt: skip
    tasks = [
        {"task": task, "metric": "acc_norm", "value": 0.5, "stderr": 0.01, "num_items": 99, "digest": "d",
         "dtype": "bfloat16", "harness": "lm-eval 0", "dense": {"model": "base", "value": 0.6, "stderr": 0.01}}
        for task in ("piqa", "arc_challenge", "lambada_openai")
    ]  # fmt: skip
    words = ["topiarist", "prune", "an-organisation/a-model-with-a-long-name-7B-instruct", "OUT", "--calibration"]
    report = result(
        layers,
        refined=refined,
        mean_error=0.03,
        warnings=["layer model.layers.0.mlp.up_proj (8x8), ALPS: " + "damping raised to 1e-2 " * 6],
        weights={"before": 269_060_552, "after": 269_060_552, "dtype": "bfloat16"},
        command=[*words, "/a/very/long/path/without/any/space/in/it/" + "x" * 80 + "/calibration.jsonl"],
        not_in_command=[],
        model="an-organisation/a-model-with-a-long-name-7B-instruct",
        settings={"damping": 0.01, "block_size": 128},
        calibration={"num_windows": 128, "window_tokens": 2048, "seed": 0, "digest": "ab" * 32},
    ).report
    return Result(report, "0.1.0", {"perplexity": perplexity, "tasks": tasks}, BENCH, {}, folder)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_a_result_s_page(tmp_path: Path, width: int, dark: bool):
    seen, picture = look(report_page(full_result()), tmp_path / f"result-{width}{'-dark' * dark}", width, dark=dark)
    check(seen, picture, width, dark=dark)


@pytest.mark.parametrize("width", [1200, 390])
def test_the_comparison(tmp_path: Path, width: int):
    results = [full_result(tmp_path / f"result-number-{i}-with-a-long-name") for i in range(12)]
    seen, picture = look(compare_page(results), tmp_path / f"comparison-{width}", width)
    check(seen, picture, width, dark=False)


def check(seen: dict, picture: Path, width: int, *, dark: bool) -> None:
    from matplotlib.image import imread

    assert seen["wide"] == width and seen["whole"] <= width, "the page scrolls sideways"
    assert not seen["out"], seen["out"]
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] >= 600
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7] * 15).round().reshape(-1, 3)}) > 20, "blank, or nearly"
    assert (pixels.mean() < 0.35) == dark
