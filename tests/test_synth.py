"""Each effect of the synthesis does what it says, and labels stay where the anatomy is."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tlseg_bids.train.dataset import IGNORE, Sample, default_protocol, load_classes
from tlseg_bids.train.synth import (
    Mix,
    Place,
    Random,
    Shape,
    acquire,
    anatomy,
    class_means,
    contrast,
    deface,
    deformed_positions,
    enhance,
    example,
    read_classes,
    read_image,
    scanner,
    strip_skull,
)
from tlseg_bids.train.synth.shape import along_axes, smooth_field

PROTOCOL = default_protocol()
CLASSES = load_classes(PROTOCOL)
SIZE = 48
CORNER = np.full(3, -(SIZE - 1) / 2)
STILL = Shape(0.0, (0.0, 0.0), 0.0, 0.0, 0.0, (0.0, 0.0))
NOTHING = Mix(**{f.name: 0.0 for f in fields(Mix)})
NONE = replace(NOTHING, rescanned=0.3, noise=1.0)


def number(kind: str, side: int = 0) -> int:
    """The class number of a kind of tissue."""
    return int(np.flatnonzero(CLASSES.kind == kind)[side])


def layers() -> torch.Tensor:
    """A head of nested balls around the middle, 1 mm: ventricle, white, cortex, fluid, bone."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    radius = grid.norm(dim=0)
    numbers = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.uint8)
    shells = (
        (22, "extra-cortical-bone"), (19, "csf"), (15, "cortex"), (12, "white-matter"),
        (5, "ventricle"),
    )  # fmt: skip
    for reach, kind in shells:
        numbers[radius < reach] = number(kind)
    face = (radius < 23) & (grid[1] > 16) & (grid[2] < 0) & (radius >= 19)
    numbers[face] = number("extra-soft-tissue")
    return numbers


def head(images: dict[str, torch.Tensor] | None = None) -> Sample:
    """`layers` as a sample whose template frame is that of `place`."""
    matrix = np.eye(4)
    matrix[:3, 3] = CORNER
    group = np.arange(len(PROTOCOL))
    return Sample("s", "d", layers(), images or {}, np.eye(4), group, "", PROTOCOL, matrix)


def place() -> Place:
    """The undeformed positions of `layers`."""
    return Place(deformed_positions(Random(0), STILL, CORNER, SIZE, 1.0), 1.0)


def made(seed: int, mix: Mix, sample: Sample | None = None, shape: Shape = STILL):
    """Image and channels of one example."""
    rng = Random(seed)
    positions = deformed_positions(rng, shape, CORNER, SIZE, 1.0)
    return example(rng, sample or head(), CLASSES, positions, 1.0, mix)


def is_kind(numbers: torch.Tensor, *kinds: str) -> torch.Tensor:
    """Where these kinds are."""
    return torch.isin(numbers.long(), torch.tensor([number(k) for k in kinds]))


def test_one_seed_makes_one_example_and_another_seed_another():
    mix = Mix(motion=0.5, cropped=0.3, gadolinium=0.6)
    for seed in range(6):
        first, second = made(seed, mix, shape=Shape()), made(seed, mix, shape=Shape())
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(made(0, mix)[0], made(1, mix)[0])


def test_the_state_of_one_generator_is_all_that_has_to_be_kept():
    rng, later = Random(3), Random(99)
    rng.normal(5)
    later.generator.set_state(rng.generator.get_state())
    assert torch.equal(rng.normal(4, 4), later.normal(4, 4))
    assert rng.one() == later.one()


def test_undeformed_labels_are_read_as_they_are_and_outside_is_background():
    sample, where = head(), place()
    assert torch.equal(
        read_classes(sample, where.positions, sample.template_from_voxel), sample.classes
    )
    far = where.positions + torch.tensor([0.0, 40, 0])[:, None, None, None]
    moved = read_classes(sample, far, sample.template_from_voxel)
    assert torch.equal(moved[:, :8], sample.classes[:, 40:])
    assert not moved[:, 8:].any()


def test_labels_and_image_are_read_from_the_same_place():
    """The image of a sample that is its own label map stays so under a deformation."""
    sample = head()
    sample.images = {"T1w": (sample.classes == number("white-matter")).float()}
    positions = deformed_positions(Random(5), Shape(), CORNER, SIZE, 1.0)
    matrix = sample.template_from_voxel
    image = read_image(sample, "T1w", positions, matrix)
    white = read_classes(sample, positions, matrix) == number("white-matter")
    assert ((image > 0.5) == white).float().mean() > 0.99
    assert not torch.equal(white, sample.classes == number("white-matter"))


def test_a_smooth_field_has_unit_variance_and_is_smooth():
    field = smooth_field(Random(0), 400, (16, 16, 16), 6.0)
    assert float(field.var()) == pytest.approx(1, abs=0.1)
    assert float(field.diff(dim=1).var()) < 0.1


EFFECTS = ("motion", "thick_slices", "low_resolution", "bias", "gamma", "rician", "substructure",
           "gadolinium", "partial_volume")  # fmt: skip


@pytest.mark.parametrize("effect", EFFECTS)
def test_an_effect_changes_the_image_and_no_label(effect):
    _, expected = made(0, NONE)
    for seed in range(3):
        plain, with_it = made(seed, NONE), made(seed, replace(NONE, **{effect: 1.0}))
        assert torch.equal(with_it[1], expected) and torch.equal(plain[1], expected)
        assert torch.isfinite(with_it[0]).all()
        assert not torch.allclose(plain[0], with_it[0])


@pytest.mark.parametrize("effect", ["", "motion", "thick_slices", "low_resolution", "bias"])
def test_the_anatomy_stays_under_its_labels(effect):
    """A bright ball that is acquired keeps its centre within a third of a voxel of 1 mm."""
    ball = (layers() == number("ventricle")).float()
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    mix = replace(NONE, **({effect: 1.0} if effect else {}))
    apart = []
    for seed in range(12):
        image = acquire(Random(seed), ball + 0.02, 1.0, mix, real=False)
        weight = (image - image.median()).clamp_min(0) * (image > 0.4)
        profile = [weight.sum([d for d in range(3) if d != a]) for a in range(3)]
        apart.append([float((p * axis).sum() / p.sum()) for p in profile])
    assert np.abs(np.median(apart, axis=0)).max() < 0.34
    if effect != "thick_slices":
        assert np.abs(apart).max() < 1.0


def test_partial_volume_keeps_the_mean_and_mixes_at_edges_only():
    ball = (layers() == number("ventricle")).float()
    for seed in range(5):
        mix = replace(NONE, partial_volume=1.0, thick_slices=1.0)
        there, back = scanner.scan_matrices(Random(seed), (SIZE,) * 3, 1.0, mix)
        for matrix in (*there, *back):
            torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
        seen = along_axes(back, along_axes(there, ball))
        assert float(seen.sum()) == pytest.approx(float(ball.sum()), rel=0.06)
        assert 0 < float(((seen > 0.05) & (seen < 0.95)).float().mean()) < 0.2
        assert float(seen.max()) <= 1 + 1e-5


def test_every_other_slice_of_a_thick_slice_scan_is_a_little_brighter():
    flat, found = torch.rand(SIZE, SIZE, SIZE), []
    for seed in range(6):
        voxels = torch.ones(SIZE, SIZE, 12)
        striped = scanner.interleaved(Random(seed), voxels, 2)
        assert torch.equal(striped[:, :, ::2], voxels[:, :, ::2])
        found.append(float(striped[0, 0, 1]))
        assert torch.equal(striped[:, :, 1::2], torch.full_like(voxels[:, :, 1::2], found[-1]))
        for thick in (0.0, 1.0):
            plain = replace(NONE, thick_slices=thick)
            two_passes = replace(plain, interleaved=1.0)
            images = [acquire(Random(seed), flat, 1.0, mix, real=False)
                      for mix in (plain, two_passes)]  # fmt: skip
            assert torch.equal(*images) == (thick == 0)
    assert 0.94 <= min(found) < 1 < max(found) <= 1.06


def test_only_the_brain_decides_how_an_image_is_scaled_if_it_is_to():
    """Fat ten times as bright as the brain leaves it as dark as it is, or at its upper end."""
    brain = layers() == number("cortex")
    image = 0.5 * brain + 5.0 * (layers() == number("extra-cortical-bone"))
    by_all = scanner.scale(Random(0), image, None)
    by_brain = scanner.scale(Random(0), image + 0.01 * torch.rand(image.shape), brain)
    assert float(by_all[brain].max()) < 0.2
    assert float(by_brain[brain].max()) > 0.8 and float(by_brain.max()) == pytest.approx(1.2)
    adult = replace(NONE, t1w=1.0, known_head=1.0)
    images = [made(0, replace(adult, scaled_by_brain=share))[0] for share in (0.0, 1.0)]
    assert not torch.allclose(*images)


def test_tissues_of_a_faint_scan_hardly_differ_and_its_fat_is_bright():
    plain = _cortex_minus_white("t1w", NONE)
    faint = replace(NONE, faint=1.0, known_head=1.0)
    assert np.abs(_cortex_minus_white("t1w", faint)).mean() < 0.5 * np.abs(plain).mean()
    mix = replace(faint, t1w=1.0)
    means = [class_means(Random(seed), CLASSES, mix)[0] for seed in range(20)]
    ratios = [float(m[number("extra-skin")] / m[number("white-matter")]) for m in means]
    assert max(ratios) > 2 and np.median(ratios) > 1.2


def test_a_thick_slice_averages_over_itself():
    thin = scanner.scan_matrix(40, 5.0, 0.5, 0.0)
    thick = scanner.scan_matrix(40, 5.0, 0.5, 5 / 12**0.5)
    assert (thin > 0.05).sum(1).max() <= 2
    assert (thick > 0.05).sum(1).min() >= 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_patch_thinner_than_a_slice_of_the_scan_is_seen_whole(size):
    scan = scanner.scan_matrix(size, 6.0, 0.99, 0.4)
    torch.testing.assert_close(scan.sum(1), torch.ones(len(scan)))
    back = scanner.grid_matrix(size, 6.0, 0.99, len(scan))
    flat = torch.full((size, 1), 0.7)
    torch.testing.assert_close(back @ scan @ flat, flat)


def test_ghosts_lie_along_the_phase_encoding_axis():
    image = torch.zeros(32, 32, 32)
    image[12:20, 12:20, 12:20] = 1
    ghosted = scanner.ghosts(Random(1), image, axis=1)
    line = ghosted[16, :, 16].clone()
    assert line[:8].abs().max() > 1e-3
    assert ghosted[:11].abs().max() < 1e-5 and ghosted[:, :, :11].abs().max() < 1e-5


def test_rician_noise_lifts_the_background_and_gaussian_noise_does_not():
    image = torch.zeros(24, 24, 24)
    image[:, :, 12:] = 1
    for rician, background in ((True, 0.1 * (np.pi / 2) ** 0.5), (False, 0.0)):
        noisy = scanner.noise(Random(0), image, 0.1, rician)
        assert float(noisy[:, :, :12].mean()) == pytest.approx(background, abs=0.005)
        assert float(noisy[:, :, 12:].std()) == pytest.approx(0.1, rel=0.05)


def test_a_real_scan_can_be_left_as_it_is():
    image = layers().float() / CLASSES.index.size + 0.1
    for seed in range(5):
        seen = acquire(Random(seed), image.clone(), 1.0, NOTHING, real=True)
        inside = (seen > 0) & (seen < 1.2)
        line = np.polyfit(image[inside], seen[inside], 1)
        np.testing.assert_allclose(np.polyval(line, image[inside]), seen[inside], atol=1e-5)


def test_what_was_cut_away_is_exactly_zero_and_does_not_count_for_the_scaling():
    image = layers().float() / CLASSES.index.size + 0.1
    visible = layers() == number("white-matter")
    seen = acquire(Random(0), image, 1.0, NONE, real=True, kept=scanner.Kept(visible))
    assert not seen[~visible].any()
    hidden = torch.where(visible, image, torch.tensor(50.0))
    low, high = scanner.scale(Random(1), image, visible), scanner.scale(Random(1), hidden, visible)
    torch.testing.assert_close(low[visible], high[visible])
    nothing = acquire(
        Random(0), image, 1.0, NONE, real=True, kept=scanner.Kept(torch.zeros_like(visible))
    )
    assert not nothing.any()


def test_defacing_takes_only_what_is_in_front_of_and_below_the_brain():
    numbers, where = layers(), place()
    for seed in range(8):
        kept = deface(Random(seed), CLASSES, numbers, where)
        assert kept[is_kind(numbers, "cortex", "white-matter", "ventricle", "csf")].all()
        assert kept[:, : SIZE // 2, SIZE // 2 :].all()
    faces = is_kind(numbers, "extra-soft-tissue")
    cut = [bool((~deface(Random(s), CLASSES, numbers, where))[faces].any()) for s in range(8)]
    assert any(cut)


def test_a_defaced_or_cropped_example_keeps_labels_and_image_together():
    whole = made(0, NONE)[1]
    image, channels = made(3, replace(NONE, defaced=1.0))
    assert torch.equal(channels, whole)
    assert (image[whole > 0] != 0).float().mean() > 0.9
    for seed in range(6):
        image, channels = made(seed, replace(NONE, cropped=1.0))
        assert not image[(whole > 0) & (channels == 0)].any()
        assert torch.equal(channels[channels > 0], whole[channels > 0])


def test_a_stripped_scan_keeps_all_brain_and_little_else():
    numbers = layers()
    brain = is_kind(numbers, "cortex", "white-matter", "ventricle")
    radius = (torch.arange(SIZE) - (SIZE - 1) / 2).abs()
    for seed in range(10):
        kept = strip_skull(Random(seed), CLASSES, numbers)
        assert kept[brain].all()
        assert not kept[radius > 20].any()


def test_nothing_is_known_stays_so_and_has_an_intensity():
    sample = head()
    sample.classes[20:28, 20:28, 20:28] = IGNORE
    image, channels = made(2, replace(NONE, t1w=1.0), sample)
    assert (channels[20:28, 20:28, 20:28] == IGNORE).all()
    assert 0.1 < float(image[22:26, 22:26, 22:26].mean()) < 1.2


def test_contrast_agent_brightens_what_takes_it_up_and_darkens_nothing():
    numbers = layers()
    numbers[2:5, 20:28, 20:28] = number("extra-vein")
    image = torch.full(numbers.shape, 0.4)
    vein = is_kind(numbers, "extra-vein")
    for seed in range(10):
        assert (enhance.enhance(Random(seed), CLASSES, numbers, image, place()) >= image).all()
        taken = enhance.uptake(Random(seed), CLASSES, numbers)
        assert (taken[vein] > 0.25).all()
        assert not taken[is_kind(numbers, "white-matter", "cortex", "ventricle", "csf")].any()
    fluid, bone = is_kind(numbers, "csf"), is_kind(numbers, "extra-cortical-bone")
    rises = [
        enhance.enhance(Random(s), CLASSES, numbers, image, place()) - image for s in range(10)
    ]
    edge = fluid & enhance.grown(bone)
    for where in (vein, edge, is_kind(numbers, "ventricle"), is_kind(numbers, "white-matter")):
        assert max(float((rise[where] > 0.1).float().mean()) for rise in rises) > 0.003
    assert max(float((rise[edge] > 0.1).float().mean()) for rise in rises) > 0.5
    rim = enhance.dura(Random(0), CLASSES, numbers, None)
    assert not rim[~fluid].any()
    assert (rim[fluid & enhance.grown(bone)] > 0).float().mean() > 0.8
    falx = (enhance.dura(Random(0), CLASSES, numbers, place()) > 0) & ~(rim > 0)
    x, _, z = place().positions
    assert falx.any() and float(x[falx].abs().max()) <= 0.5 and float(z[falx].min()) > 0
    plexus = [enhance.choroid_plexus(Random(s), CLASSES, numbers, 1.0) for s in range(5)]
    assert any(p.any() for p in plexus)
    assert not any(p[~is_kind(numbers, "ventricle")].any() for p in plexus)


def test_vessels_are_few_thin_and_inside_the_brain_and_its_fluid():
    numbers = torch.full((96, 96, 96), number("white-matter"), dtype=torch.uint8)
    numbers[:, :, 48:] = number("csf")
    numbers[:12] = 0
    share = []
    for seed in range(6):
        tubes = enhance.vessels(Random(seed), CLASSES, numbers, 1.0)
        assert not tubes[:12].any()
        share.append(
            [float((t > 0.2).float().mean()) for t in (tubes[12:, :, :48], tubes[12:, :, 48:])]
        )
    assert (np.array(share) < 0.05).all() and np.max(share) > 0.001
    assert np.mean(share, axis=0)[1] > np.mean(share, axis=0)[0]


def test_contrast_agent_is_not_given_to_t2w():
    for seed in range(3):
        runs = [
            anatomy.paint(Random(seed), CLASSES, layers(), replace(NONE, t2w=1.0, gadolinium=g))
            for g in (0.0, 1.0)
        ]
        assert torch.equal(*runs)


def _cortex_minus_white(name: str, mix: Mix, draws: int = 60) -> np.ndarray:
    share = {"t1w": 0.0, "t2w": 0.0, "infant_t1w": 0.0, "infant_t2w": 0.0, name: 1.0}
    means = [class_means(Random(s), CLASSES, replace(mix, **share))[0] for s in range(draws)]
    return np.array([float(m[number("cortex")] - m[number("white-matter")]) for m in means])


def test_unmyelinated_white_matter_is_darker_than_cortex_in_t1w_and_brighter_in_t2w():
    newborn = replace(NONE, unmyelinated=1.0)
    assert np.mean(_cortex_minus_white("infant_t1w", newborn) > 0) > 0.8
    assert np.mean(_cortex_minus_white("infant_t2w", newborn) < 0) > 0.8
    assert np.mean(_cortex_minus_white("t1w", newborn) < 0) > 0.95


@pytest.mark.parametrize("name", ["infant_t1w", "infant_t2w"])
def test_isointense_scans_occur_and_every_stage_between(name):
    middle = _cortex_minus_white(name, replace(NONE, isointense=1.0))
    assert abs(middle.mean()) < 0.03
    evenly = _cortex_minus_white(name, NONE)
    assert evenly.min() < -0.1 and evenly.max() > 0.05
    weighting = "T1w" if name.endswith("t1w") else "T2w"
    assert 0.05 < contrast.isointense_maturity(CLASSES, weighting) < 0.95


def test_large_structures_are_not_flat():
    numbers = torch.full((64, 64, 64), number("white-matter"), dtype=torch.uint8)
    one = replace(NONE, t1w=1.0)
    blocks = {}
    for parts in (0.0, 1.0):
        spread = []
        for seed in range(6):
            image = anatomy.paint(Random(seed), CLASSES, numbers, replace(one, substructure=parts))
            spread.append(float(torch.nn.functional.avg_pool3d(image[None], 8).std()))
        blocks[parts] = np.mean(spread)
    assert blocks[1.0] > 2 * blocks[0.0]


def test_left_and_right_of_a_structure_have_the_same_parts():
    left = number("thalamus")
    right = int(CLASSES.mirror[left])
    numbers = torch.full((24, 24, 24), left, dtype=torch.uint8)
    drawn = contrast.Contrast(*(torch.full((len(CLASSES.index),), v) for v in (0.5, 0.0, 0.1)))
    one, other = (
        anatomy.tissue(Random(4), CLASSES, drawn, n, 1.0, True)
        for n in (numbers, torch.full_like(numbers, right))
    )
    assert torch.equal(one, other)
    assert one.std() > 0.01


def test_every_column_that_the_synthesis_reads_is_complete():
    table = CLASSES.contrasts
    assert table.notna().all().all()
    assert (
        ((table[["texture", "gadolinium"]] >= 0) & (table[["texture", "gadolinium"]] <= 1))
        .all()
        .all()
    )
    assert (CLASSES.tissue[1:] >= 0).all(), "a class has no tissue"


class Elsewhere(Random):
    """Draws for a device whose values nobody can read, and on which nothing is computed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.device = torch.device("meta")

    def normal(self, *shape: int) -> torch.Tensor:
        self.below(2)
        return torch.empty(shape, device=self.device)


@pytest.mark.parametrize(
    "mix",
    [
        Mix(gadolinium=1.0, motion=1.0, skull_stripped=0.0, defaced=1.0, cropped=1.0),
        Mix(skull_stripped=1.0, thick_slices=1.0),
        Mix(real=1.0, motion=1.0),
        Mix(t1w=1.0, faint=1.0, thick_slices=1.0, interleaved=1.0, scaled_by_brain=1.0),
    ],
)
def test_everything_is_made_on_the_device_and_nothing_is_read_back_from_it(mix):
    """On this device a tensor left on the CPU, or a decision taken from a voxel, is an error."""
    for seed in range(8):
        rng = Elsewhere(seed)
        sample = head({"T1w": layers().float()} if mix.real else None)
        positions = deformed_positions(rng, Shape(), CORNER, SIZE, 1.0)
        image, channels = example(rng, sample, CLASSES, positions, 1.0, mix)
        assert {image.device.type, channels.device.type} == {"meta"}
        assert image.shape == channels.shape == (SIZE,) * 3
    with pytest.raises(RuntimeError):
        float(image.sum())


@pytest.mark.gpu
def test_another_device_makes_the_same_decisions():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mix = Mix(motion=0.3, cropped=0.3)
    for seed in range(8):
        found = []
        for device in ("cpu", "cuda"):
            rng = Random(seed, device)
            positions = deformed_positions(rng, Shape(), CORNER, SIZE, 1.0)
            image, channels = example(rng, head(), CLASSES, positions, 1.0, mix)
            assert {image.device.type, channels.device.type} == {device}
            found.append((image.cpu(), channels.cpu()))
        (a, b), (c, d) = found
        assert (b == d).float().mean() > 0.999
        assert np.corrcoef(a.flatten(), c.flatten())[0, 1] > 0.8 or float(a.std()) < 0.05


def test_a_scans_own_contrast_is_measured_and_drawn_near():
    count = len(CLASSES.index)
    numbers = torch.zeros(12, 12, 12, dtype=torch.uint8)
    bright, dark = number("white-matter"), number("cortex")
    numbers[2:6], numbers[6:10] = bright, dark
    numbers[0, 0, 0] = number("csf")
    image = torch.zeros(12, 12, 12)
    image[2:6], image[6:10] = 800.0, 200.0
    image[6:10, ::2] += 40.0
    table = contrast.own_contrast(image, numbers, count)
    torch.testing.assert_close(table[:, bright], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(table[:, dark], torch.tensor([0.275, 0.025]))
    assert table[:, number("csf")].isnan().all()  # a single voxel says nothing
    own = contrast.Own(table, "T2w")
    drawn = [contrast.draw_contrast(Random(s), CLASSES, replace(NONE, own=1.0), own)
             for s in range(30)]  # fmt: skip
    apart = np.array([float(one.means[bright] - one.means[dark]) for one in drawn])
    assert np.all(abs(apart - 0.725) < 0.35) and apart.std() > 0.02
    assert all(torch.isfinite(one.means).all() and one.weighting == "T2w" for one in drawn)
    without = contrast.draw_contrast(Random(0), CLASSES, replace(NONE, own=1.0))
    assert without.weighting != "T2w"
