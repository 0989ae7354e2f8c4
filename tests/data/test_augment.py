import hashlib

import pytest
import torch

from dynaslim.data.colour import jitter, rand_augment
from dynaslim.data.transforms import Augment, mix, normalise
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe

STRONG = AugmentRecipe(randaugment_ops=2, jitter=0.4, erasing=0.5)


def _pixels(rows=8, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    shape = (rows, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _smooth(rows=16, size=24):
    """Images without a value twice in a row or column."""
    x = torch.linspace(0.1, 0.6, size)
    return (x + 0.6 * x[:, None]).div(1.2).expand(rows, 3, size, size).clone()


def _plain(**changes):
    return AugmentRecipe(**{"crop": "none", "mirror": False, **changes})


# recorded from the first version, which knew only shift and mirror
@pytest.mark.parametrize(
    ("change", "digest"),
    [
        ({}, "311f8d092ec16e705c3aa43e3cec04d9f8f2b3d65ad26b389e0bf6cd9fdb2487"),
        ({"shift_px": 0}, "6ee30ab80d433666e0bf62087631d7a4c9abb1edabd88ef9c569f59ec57cda5c"),
        ({"mirror": False}, "a36aceba43876320b8465bb7a9ff71c6c6a035e5f3a0223a62726fa084c87a9f"),
        ({"shift_px": 4}, "1effad55befcf964a0cd61cf9bd817851bde939d4253eb6a8ceaf8cdd2848dfa"),
    ],
)
def test_shift_and_mirror_stay_as_recorded(change, digest):
    x = Augment(AugmentRecipe(**change), Preprocessing(32))(_pixels(), 5)
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "recipe",
    [
        AugmentRecipe(),
        AugmentRecipe(crop="resized"),
        AugmentRecipe(randaugment_ops=3),
        AugmentRecipe(jitter=0.5),
        AugmentRecipe(erasing=1.0),
        STRONG,
    ],
)
def test_augmentation_is_a_function_of_its_seed(recipe):
    augment = Augment(recipe, Preprocessing(32))
    pixels = _pixels()
    kept = pixels.clone()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = augment(pixels, 1)
    torch.rand(3)
    again, other = augment(pixels, 1), augment(pixels, 2)
    fresh = Augment(recipe, Preprocessing(32))(pixels, 1)
    assert torch.equal(first, again)
    assert torch.equal(first, fresh)
    assert not torch.equal(first, other)
    assert first.shape == pixels.shape
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(pixels, kept)
    # nothing outside is disturbed, so that a training step's randomness stays its own
    torch.random.set_rng_state(state)
    augment(pixels, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_to_do_is_normalisation():
    pixels, preprocessing = _pixels(), Preprocessing(32)
    x = normalise(pixels, preprocessing)
    assert torch.equal(Augment(_plain(), preprocessing)(pixels, 1), x)
    # a resized crop that decoding has done is not done twice
    done = Augment(_plain(crop="resized"), preprocessing, resized_already=True)
    assert torch.equal(done(pixels, 1), x)


def test_resized_crop_takes_parts_of_the_image():
    size = 32
    ramp = torch.arange(size, dtype=torch.uint8).mul(8).expand(64, 3, size, size).contiguous()
    preprocessing = Preprocessing(size, (0.0,) * 3, (1.0,) * 3)
    x = Augment(_plain(crop="resized", scale_min=0.25), preprocessing)(ramp, 3) * 255
    widths = (x[:, 0, 0].amax(-1) - x[:, 0, 0].amin(-1)) / 8 + 1
    assert widths.min() >= size * (0.25 * 3 / 4) ** 0.5 - 2
    assert widths.max() <= size + 1
    assert widths.std() > 2
    whole = Augment(_plain(crop="resized", scale_min=1.0), preprocessing)(ramp, 3) * 255
    assert (whole[:, 0, 0].amax(-1) - whole[:, 0, 0].amin(-1)).min() > 8 * (size - 6)


def test_erasing_leaves_the_rest_untouched():
    pixels, preprocessing = _pixels(64), Preprocessing(32)
    x = normalise(pixels, preprocessing)
    out = Augment(_plain(erasing=0.5), preprocessing)(pixels, 4)
    changed = (out != x).any(1)
    erased = changed.flatten(1).any(1)
    assert 16 < erased.sum() < 48
    noise = []
    for row in erased.nonzero().flatten().tolist():
        ys, xs = changed[row].nonzero().T
        box = changed[row, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert box.all(), "a full rectangle"
        assert 0.01 < box.numel() / 32**2 < 0.4
        noise.append(out[row][:, changed[row]].flatten())
    values = torch.cat(noise)
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


def test_every_image_draws_its_own_randaugment():
    x = _smooth(64)
    out = rand_augment(x, 1, 9.0, 0.5, torch.Generator().manual_seed(0))
    kinds = {tuple(image.flatten()[:200].tolist()) for image in out}
    assert len(kinds) > 20
    assert out.min() >= 0
    assert out.max() <= 1
    kept = sum(torch.equal(a, b) for a, b in zip(x, out, strict=True))
    assert 1 <= kept < 20, "the identity is one of the operations, and only one"


def test_randaugment_without_strength_changes_little():
    """At magnitude 0 only autocontrast and equalize do anything."""
    generator = torch.Generator().manual_seed(0)
    x = (_smooth(256) * 255).round() / 255
    out = rand_augment(x, 1, 0.0, 0.0, generator)
    changed = ((out - x).abs().amax((1, 2, 3)) > 2e-3).sum()
    assert 0.05 * 256 < changed < 0.3 * 256


def test_stronger_randaugment_changes_more():
    x = _smooth(256)
    far = []
    for magnitude in (1.0, 5.0, 10.0):
        out = rand_augment(x, 2, magnitude, 0.0, torch.Generator().manual_seed(1))
        far.append(float((out - x).abs().mean()))
    assert far[0] < far[1] < far[2]


def test_shapes_move_about_the_centre():
    """A point in the middle stays under rotation and shear; all shapes keep a grey image."""
    grey = torch.full((512, 1, 9, 9), 0.5)
    generator = torch.Generator().manual_seed(2)
    assert torch.allclose(
        rand_augment(grey, 3, 8.0, 0.0, generator).mean((1, 2, 3)).median(), torch.tensor(0.5)
    )
    from dynaslim.data.colour import _matrices

    matrix = _matrices(torch.tensor([0, 1, 2, 3, 4]), torch.ones(5), 9)
    centre = torch.tensor([4.0, 4.0, 1.0])
    moved = matrix @ centre
    assert torch.allclose(moved[:3], torch.full((3, 2), 4.0))
    assert torch.allclose(moved[3:] - 4, torch.tensor([[4.05, 0.0], [0.0, 4.05]]))
    assert torch.allclose(torch.linalg.det(matrix[:, :, :2]), torch.ones(5))


def test_jitter_stays_within_its_share():
    x = torch.full((200, 3, 4, 4), 0.5)  # flat and grey: only brightness shows
    level = jitter(x, 0.4, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert 0.3 <= level.min() < 0.33
    assert 0.67 < level.max() <= 0.7
    assert torch.equal(jitter(x, 0.0, torch.Generator()), x)


def test_grey_images():
    preprocessing = Preprocessing(32, (0.5,), (0.25,))
    x = Augment(STRONG, preprocessing)(_pixels(channels=1), 3)
    assert x.shape == (8, 1, 32, 32)
    assert x.isfinite().all()


def _constant(rows=6):
    """Image k has the value k everywhere, and class k."""
    labels = torch.arange(rows)
    return labels.float().view(-1, 1, 1, 1).expand(rows, 3, 16, 16).contiguous(), labels


@pytest.mark.parametrize("recipe", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_targets_agree_with_the_pixels(recipe):
    x, labels = _constant()
    for seed in range(20):
        mixed, targets = mix(x, labels, 8, AugmentRecipe(**recipe), seed)
        assert targets.shape == (6, 8)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        # the mean value of an image of constants is what its classes weigh
        expected = targets @ torch.arange(8.0)
        assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)
        assert torch.equal(mix(x, labels, 8, AugmentRecipe(**recipe), seed)[0], mixed)
    assert torch.equal(x, _constant()[0])


def test_mixup_adds_and_cutmix_cuts():
    x, labels = _constant()
    added, _ = mix(x, labels, 6, AugmentRecipe(mixup=1.0), 1)
    assert torch.allclose(added, added[:, :1, :1, :1].expand_as(added), atol=1e-6)
    assert (added.frac().abs() > 1e-3).any()
    cut, _ = mix(x, labels, 6, AugmentRecipe(cutmix=1.0), 1)
    assert set(cut.unique().tolist()) <= set(range(6))
    assert (cut != x).any()
    # with both, a coin: the cut leaves whole numbers
    both = AugmentRecipe(mixup=1.0, cutmix=1.0)
    cuts = sum(bool((mix(x, labels, 6, both, s)[0].frac() == 0).all()) for s in range(200))
    assert 70 < cuts < 130


def test_without_mixing_labels_stay_numbers():
    x, labels = _constant()
    same, targets = mix(x, labels, 6, AugmentRecipe(), 1)
    assert same is x
    assert targets is labels
