"""RandAugment as the loader draws it: one draw for a group of images, whatever shares them out."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import RandAugment

from training import data
from training.data import DATASETS, GROUP, Loader, Split

N, BATCH = 101, 23  # batches begin and end within groups


def noise(name: str = "CIFAR10") -> Split:
    """Noise, neither cropped nor mirrored: each image is labelled by its index."""
    spec = replace(DATASETS[name], padding=0, flip=False)
    generator = torch.Generator().manual_seed(1)
    shape = (N, spec.channels, spec.size, spec.size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(N), spec)


def epoch(split: Split, number: int = 1, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels and labels of an epoch."""
    loader = Loader(split, BATCH, **{"train": True, "seed": 3} | arguments)
    loader.set_epoch(number)
    images, labels = (torch.cat(batches) for batches in zip(*loader, strict=True))
    return images * loader.std + loader.mean, labels


@pytest.mark.parametrize("magnitude", [1, 9, 17, 30])
@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10"])
def test_a_group_goes_through_torchvisions_operations_together(name, magnitude):
    split = noise(name)
    pixels, labels = epoch(split, randaugment=magnitude)
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)  # uint8 throughout
    changed = 0
    for group in range(N // GROUP):
        positions = slice(group * GROUP, (group + 1) * GROUP)
        images = split.images[labels[positions]]
        with data.seeded(f"3/1/group {group}"):
            expected = RandAugment(num_ops=2, magnitude=magnitude)(images)
        assert torch.equal(pixels[positions].round(), expected.float())
        changed += not torch.equal(expected, images)
    assert changed > 1


def test_groups_draw_anew_and_an_image_has_the_draw_of_its_group():
    split = noise()
    same = replace(split, images=split.images[:1].expand_as(split.images))
    pixels, _ = epoch(same, randaugment=9)
    groups = pixels.round().split(GROUP)
    assert all(torch.equal(group, group[:1].expand_as(group)) for group in groups)
    assert len({tuple(group[0].flatten().tolist()) for group in groups}) > 2


def test_draws_depend_on_seed_and_epoch_and_leave_all_else_as_it_is():
    split = noise()
    before = torch.get_rng_state()
    plain, labels = epoch(split)
    augmented, same_labels = epoch(split, randaugment=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(labels, same_labels)
    assert torch.equal(augmented, epoch(split, randaugment=9)[0])
    changed = (plain != augmented).flatten(1).any(1)
    assert 0.5 < changed.float().mean() <= 1
    tests = [epoch(split, train=False, randaugment=strength)[0] for strength in (0, 9)]
    assert torch.equal(*tests)
    # The same images in the same order, so that nothing but the operations can differ.
    same = replace(split, images=split.images[:1].expand_as(split.images))
    augmented, _ = epoch(same, randaugment=9)
    for other in (epoch(same, 2, randaugment=9)[0], epoch(same, seed=4, randaugment=9)[0]):
        assert not torch.equal(other, augmented)


def test_ranks_share_a_batch_and_a_resumed_epoch_goes_on_as_one_process_draws():
    arguments = {"train": True, "seed": 3, "randaugment": 9}
    whole = Loader(noise(), BATCH, **arguments)
    expected = list(whole)
    ranks = [Loader(noise(), BATCH, **arguments, rank=rank, world=3) for rank in range(3)]
    shares = zip(*ranks, strict=True)
    together = [[torch.cat(parts) for parts in zip(*share, strict=True)] for share in shares]
    for actual, batches in ((together, expected), (list(whole.batches(start=2)), expected[2:])):
        assert len(actual) == len(batches)
        for one, other in zip(actual, batches, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
