"""Make docs/page.png: the server's page in a browser, with the network of `dynaslim demo`.

    .venv/bin/dynaslim demo
    .venv/bin/python scripts/screenshot_page.py

Needs chromium, and a machine without other work, else the page shows no times; `--scheme dark` and
`--out` make other pictures.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
SIZE = {"width": 1200, "height": 840}


def photograph(page: Page, sample: str, step: int, out: Path) -> None:
    page.get_by_role("button", name=f"Sample: {sample}").click()
    expect(page.locator("#classes .class-name").first).to_be_visible()
    with page.expect_response("**/v1/predict?*budget=*"):
        page.get_by_role("slider").fill(str(step))
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # what moves has come to rest
    page.screenshot(path=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "runs/demo/checkpoint.safetensors"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/page.png")
    parser.add_argument("--sample", default="Shirt")
    parser.add_argument("--step", type=int, default=6, help="of the budget's slider")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no browser: apt-get install chromium")
    command = [sys.executable, "-m", "dynaslim", "serve", str(args.checkpoint), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()  # says where, once it is ready
        url = next(word for word in line.split() if word.startswith("http"))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE, color_scheme=args.scheme)
            page.goto(url)
            photograph(page, args.sample, args.step, args.out)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
