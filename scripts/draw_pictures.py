"""Draw dynaslim/shipped/pictures: one for each class of the network that ships, to try it on.

    python scripts/draw_pictures.py [FOLDER]

Simple shapes, so that they are ours to give away; the network takes most of them for what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

OUT = Path(__file__).parents[1] / "dynaslim" / "shipped" / "pictures"
SIDE, DRAWN = 96, 384
"""Pixels of a picture, and of what it is reduced from."""
Colour = tuple[int, int, int]
BLACK, WHITE, EYE = (25, 25, 25), (235, 235, 238), (15, 15, 10)


class Sheet:
    """A picture in the making; places are shares of its side."""

    def __init__(
        self, top: Colour, bottom: Colour, ground: tuple[float, Colour] | None = None
    ) -> None:
        self.image = Image.new("RGB", (DRAWN, DRAWN))
        self.draw = ImageDraw.Draw(self.image)
        for y in range(DRAWN):
            fill = tuple(int(a + (b - a) * y / DRAWN) for a, b in zip(top, bottom, strict=True))
            self.draw.line([(0, y), (DRAWN, y)], fill=fill)
        if ground is not None:
            self.box(0, ground[0], 1, 1, ground[1])

    def shape(self, fill: Colour, *places: tuple[float, float]) -> None:
        """A polygon."""
        self.draw.polygon([(x * DRAWN, y * DRAWN) for x, y in places], fill=fill)

    def oval(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """An ellipse."""
        self.draw.ellipse([v * DRAWN for v in (left, top, right, bottom)], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """A rectangle."""
        self.draw.rectangle([v * DRAWN for v in (left, top, right, bottom)], fill=fill)

    def wheel(self, x: float, y: float, radius: float) -> None:
        """A tyre and its hub."""
        for r, fill in ((radius, BLACK), (radius / 2, (175, 175, 175))):
            self.oval(x - r, y - r, x + r, y + r, fill)


def airplane() -> Sheet:
    s = Sheet((90, 140, 210), (170, 200, 235))
    body = (0.1, 0.5), (0.2, 0.44), (0.8, 0.44), (0.92, 0.5), (0.8, 0.55), (0.2, 0.55)
    s.shape(WHITE, *body)
    s.shape((190, 195, 205), (0.42, 0.5), (0.56, 0.5), (0.78, 0.78), (0.66, 0.78))
    s.shape((210, 214, 222), (0.42, 0.46), (0.54, 0.46), (0.7, 0.24), (0.62, 0.24))
    s.shape((200, 60, 60), (0.12, 0.47), (0.24, 0.47), (0.14, 0.28), (0.07, 0.28))
    s.box(0.3, 0.475, 0.8, 0.49, (90, 110, 150))
    return s


def automobile() -> Sheet:
    s = Sheet((190, 205, 220), (220, 220, 220), (0.7, (120, 120, 120)))
    roof = (0.05, 0.55), (0.22, 0.52), (0.34, 0.36), (0.66, 0.36), (0.8, 0.52), (0.95, 0.56)
    s.shape((200, 30, 30), *roof, (0.95, 0.72), (0.05, 0.72))
    s.shape((50, 60, 75), (0.27, 0.52), (0.37, 0.4), (0.49, 0.4), (0.49, 0.52))
    s.shape((50, 60, 75), (0.52, 0.4), (0.63, 0.4), (0.73, 0.52), (0.52, 0.52))
    for x in (0.24, 0.76):
        s.wheel(x, 0.72, 0.1)
    return s


def bird() -> Sheet:
    s, blue, dark = Sheet((170, 200, 220), (150, 185, 150)), (80, 110, 170), (60, 85, 140)
    s.oval(0.25, 0.34, 0.72, 0.68, blue)
    s.oval(0.6, 0.2, 0.84, 0.44, blue)
    s.shape((230, 160, 40), (0.82, 0.3), (0.97, 0.34), (0.82, 0.38))
    s.shape(dark, (0.3, 0.46), (0.03, 0.4), (0.06, 0.56), (0.3, 0.58))
    s.oval(0.34, 0.42, 0.62, 0.62, dark)
    s.oval(0.72, 0.27, 0.77, 0.32, EYE)
    s.box(0, 0.78, 1, 0.83, (90, 60, 40))
    for x in (0.46, 0.54):
        s.box(x, 0.66, x + 0.02, 0.79, (200, 140, 40))
    s.oval(0.42, 0.5, 0.72, 0.68, (225, 200, 170))
    return s


def cat() -> Sheet:
    s, grey = Sheet((200, 180, 160), (180, 160, 140)), (95, 95, 100)
    s.oval(0.2, 0.22, 0.8, 0.8, grey)
    s.shape(grey, (0.22, 0.42), (0.24, 0.1), (0.46, 0.26))
    s.shape(grey, (0.78, 0.42), (0.76, 0.1), (0.54, 0.26))
    for x in (0.37, 0.63):
        s.oval(x - 0.07, 0.4, x + 0.07, 0.53, (190, 200, 90))
        s.oval(x - 0.02, 0.4, x + 0.02, 0.53, EYE)
    s.oval(0.36, 0.58, 0.64, 0.76, (150, 150, 155))
    s.shape((220, 120, 120), (0.46, 0.58), (0.54, 0.58), (0.5, 0.63))
    return s


def deer() -> Sheet:
    s, brown = Sheet((130, 140, 90), (100, 115, 70)), (150, 105, 60)
    s.oval(0.24, 0.42, 0.7, 0.64, brown)
    s.shape(brown, (0.6, 0.5), (0.7, 0.24), (0.78, 0.26), (0.72, 0.56))
    s.oval(0.66, 0.18, 0.9, 0.32, brown)
    for x in (0.28, 0.36, 0.57, 0.64):
        s.box(x, 0.56, x + 0.035, 0.9, brown)
    antlers = (0.72, 0.2, 0.6, 0.02), (0.66, 0.1, 0.72, 0), (0.78, 0.19, 0.86, 0.02)
    for line in (*antlers, (0.82, 0.1, 0.92, 0.06)):
        s.draw.line([v * DRAWN for v in line], fill=(90, 70, 45), width=8)
    return s


def dog() -> Sheet:
    s = Sheet((120, 160, 90), (90, 130, 70))
    s.oval(0.24, 0.18, 0.76, 0.72, (190, 140, 85))
    for left in (0.12, 0.68):
        s.oval(left, 0.2, left + 0.2, 0.62, (120, 80, 45))
    s.oval(0.34, 0.46, 0.66, 0.82, (225, 195, 150))
    s.oval(0.43, 0.5, 0.57, 0.6, EYE)
    for x in (0.38, 0.62):
        s.oval(x - 0.045, 0.34, x + 0.045, 0.43, EYE)
    return s


def frog() -> Sheet:
    s = Sheet((120, 150, 70), (80, 110, 50))
    s.oval(0.15, 0.42, 0.85, 0.85, (70, 140, 40))
    for left in (0.1, 0.64):
        s.oval(left, 0.6, left + 0.26, 0.9, (60, 125, 35))
    s.oval(0.26, 0.22, 0.74, 0.62, (85, 155, 50))
    for x in (0.33, 0.67):
        s.oval(x - 0.09, 0.17, x + 0.09, 0.35, (95, 165, 55))
        s.oval(x - 0.055, 0.2, x + 0.055, 0.31, EYE)
    mouth = [v * DRAWN for v in (0.34, 0.36, 0.66, 0.56)]
    s.draw.arc(mouth, 20, 160, fill=(40, 70, 20), width=6)
    return s


def horse() -> Sheet:
    s = Sheet((150, 190, 230), (190, 215, 235), (0.68, (90, 140, 60)))
    brown, mane = (110, 65, 35), (40, 25, 15)
    s.oval(0.22, 0.36, 0.72, 0.62, brown)
    s.shape(brown, (0.6, 0.44), (0.76, 0.16), (0.84, 0.2), (0.74, 0.54))
    s.shape(brown, (0.74, 0.14), (0.82, 0.14), (0.95, 0.3), (0.9, 0.36), (0.76, 0.28))
    for x in (0.27, 0.35, 0.59, 0.66):
        s.box(x, 0.55, x + 0.05, 0.88, brown)
    s.shape(mane, (0.24, 0.42), (0.14, 0.5), (0.12, 0.74), (0.18, 0.74), (0.24, 0.54))
    s.shape(mane, (0.6, 0.36), (0.73, 0.12), (0.77, 0.13), (0.66, 0.42))
    return s


def ship() -> Sheet:
    s = Sheet((150, 190, 230), (200, 220, 240), (0.62, (40, 80, 130)))
    s.shape((150, 40, 35), (0.08, 0.5), (0.92, 0.5), (0.82, 0.7), (0.18, 0.7))
    s.box(0.08, 0.48, 0.92, 0.53, WHITE)
    s.box(0.3, 0.36, 0.7, 0.48, WHITE)
    s.box(0.4, 0.26, 0.6, 0.36, (225, 225, 225))
    s.box(0.47, 0.12, 0.53, 0.26, BLACK)
    s.box(0.34, 0.4, 0.66, 0.43, (60, 80, 110))
    return s


def truck() -> Sheet:
    s = Sheet((175, 195, 215), (215, 220, 225), (0.74, (110, 110, 110)))
    s.box(0.06, 0.26, 0.62, 0.7, WHITE)
    cab = (0.64, 0.4), (0.82, 0.4), (0.93, 0.55), (0.93, 0.72), (0.64, 0.72)
    s.shape((190, 40, 40), *cab)
    s.shape((60, 80, 100), (0.7, 0.44), (0.81, 0.44), (0.88, 0.55), (0.7, 0.55))
    s.box(0.06, 0.68, 0.93, 0.73, (60, 60, 60))
    for x in (0.18, 0.36, 0.8):
        s.wheel(x, 0.74, 0.08)
    return s


PICTURES: tuple[Callable[[], Sheet], ...] = (
    airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck,
)  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        image = picture().image.filter(ImageFilter.GaussianBlur(2))
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(folder / f"{picture.__name__}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
