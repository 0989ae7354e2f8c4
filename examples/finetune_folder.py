"""Fine-tune a trained network on your own image folder with other classes.

    python examples/finetune_folder.py CHECKPOINT PHOTOS OUT [EPOCHS]

CHECKPOINT is a trained network, such as runs/demo/checkpoint.safetensors. PHOTOS has a folder of
images for each class; a tenth of the images is held out for evaluation. Results are written to the
folder OUT; the network is gate.safetensors. If interrupted, run the same command again to continue.

It shows both training stages from Python: stage I from a checkpoint (`init`), with a new classifier
and a low learning rate; and stage II, a gate for 60 % of the widest route's cost.
"""

import shutil
import sys

import dynaslim
from dynaslim.recipes import AugmentRecipe, DataRecipe, OptimRecipe
from dynaslim.runs import RunOptions


def main(checkpoint: str, photos: str, out: str, epochs: int = 10) -> None:
    start = dynaslim.read(checkpoint)
    assert start.preprocessing is not None, "the checkpoint does not say how images are prepared"
    data = DataRecipe(
        photos,
        image_size_px=start.preprocessing.image_size_px,
        crop_fraction=start.preprocessing.crop_fraction,
    )
    augment = AugmentRecipe(crop="resized", scale_min=0.5)
    options = RunOptions(resume=True)

    supernet = dynaslim.SupernetRecipe(
        model=start.net.spec.name,  # or the spec file of a network that is not in the zoo
        init=checkpoint,
        epochs=epochs,
        batch_size=32,
        optim=OptimRecipe(lr=0.02),  # a twentieth of the rate for training from scratch
        data=data,
        augment=augment,
    )
    tuned = dynaslim.run_supernet(supernet, f"{out}/supernet", options)

    gate = dynaslim.GateRecipe(
        supernet=tuned["files"]["last"], targets=0.6, batch_size=32, data=data, augment=augment
    )
    gates = dynaslim.run_gate(gate, f"{out}/gate", options)

    best = gates["gates"][0]
    print(f"{best['val']['images']} images held out")
    for route in best["val"]["routes"]:
        name = "-".join(map(str, route["widths"]))
        print(f"  {name:<24} {route['madds'] / 1e6:7.2f} M  {route['top1']:.1%}")
    dynamic = best["val"]["dynamic"]
    print(f"  {'every image its route':<24} {dynamic['mean_madds'] / 1e6:7.2f} M  ", end="")
    print(f"{dynamic['top1']:.1%}")
    file = shutil.copy(best["file"], f"{out}/gate.safetensors")
    print(f"{file}: use it with dynaslim predict, export, serve, or dynaslim.Engine")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: finetune_folder.py CHECKPOINT PHOTOS OUT [EPOCHS]")
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
