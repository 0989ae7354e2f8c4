import io

from PIL import Image

from dynaslim.runs.curves import curves_figure


def _colours(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.size, len(picture.convert("RGB").getcolors(1 << 24))


def test_curves_of_a_run():
    train = [
        {"kind": "train", "step": n, "lr": 0.1, "largest": 2 / n, "randoms": [1 / n, 2 / n]}
        for n in range(1, 40)
    ]
    val = [{"kind": "val", "step": n, "top1": [0.5, 0.6]} for n in (20, 39)]
    (wide, _), colours = _colours(curves_figure([*train, *val]))
    assert wide > 800
    assert colours > 100, "an empty figure has few colours"
    assert _colours(curves_figure(train))[1] > 50
    assert curves_figure([]), "a run that was stopped before its first line has a picture too"
