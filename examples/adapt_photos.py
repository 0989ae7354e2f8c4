"""Adapt a trained network from timm to your own photographs, so that it costs less on them.

    python examples/adapt_photos.py MODEL PHOTOS OUT [MINUTES]

MODEL is a model name of timm, such as tf_efficientnet_lite0; timm downloads its weights. PHOTOS has
a folder of images for each class. If interrupted, run the same command again to continue.

It shows `dynaslim adapt` called from Python for an existing module, and its results: a checkpoint
with budgets, and the table of the report as values.
"""

import sys

import dynaslim
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import RunOptions


def main(name: str, photos: str, out: str, minutes: float = 30.0) -> None:
    import timm

    model = timm.create_model(name, pretrained=True).eval()
    prepared = timm.data.resolve_model_data_config(model)
    done = dynaslim.adapt(
        model,
        photos,
        out,
        preprocessing=Preprocessing(
            prepared["input_size"][-1],
            mean=prepared["mean"],
            std=prepared["std"],
            crop_fraction=prepared["crop_pct"],
        ),
        run=RunOptions(resume=True),
        minutes=minutes,
    )
    for mode in done.data.modes:
        ms = "" if mode.ms is None else f"{mode.ms:8.2f} ms"
        print(f"{mode.name:<24} {mode.madds / 1e6:8.1f} M {mode.top1:7.1%}{ms}")
    print(done.verdict)

    engine = dynaslim.Engine(done.checkpoint)  # for your own batches: engine(x, budget=0.5)
    print(f"{done.files['checkpoint']}: runs by {engine.backend}")
    engine.close()


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: adapt_photos.py MODEL PHOTOS OUT [MINUTES]")
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
