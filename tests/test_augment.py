"""RandAugment against torchvision's own, one image at a time, and the loader that draws it."""

import pytest
import torch
from torchvision.transforms.v2 import RandAugment

from training.augment import OPERATIONS, STRONGEST, rand_augment
from training.data import DATASETS, Loader, Split


def noise(n: int, channels: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_goes_through_its_own_operations(channels):
    images = noise(60, channels)
    draws = torch.randint(2 * len(OPERATIONS), (60, 2), generator=torch.Generator().manual_seed(2))
    together = rand_augment(images, draws, 9)
    alone = [rand_augment(images[i : i + 1], draws[i : i + 1], 9) for i in range(60)]
    assert together.dtype == torch.uint8
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("magnitude", [1, 9, 17, STRONGEST])
def test_operations_are_those_of_torchvision(monkeypatch, magnitude):
    images = noise(4, 3)
    space = RandAugment._AUGMENTATION_SPACE
    assert len(space) == len(OPERATIONS)
    for number, (name, entry) in enumerate(space.items()):
        monkeypatch.setattr(RandAugment, "_AUGMENTATION_SPACE", {name: entry})
        for negative in (0, 1):
            monkeypatch.setattr(torch, "rand", lambda _, n=negative: torch.tensor(1.0 - n))
            expected = RandAugment(num_ops=1, magnitude=magnitude)(images)
            draws = torch.full((4, 1), 2 * number + negative)
            difference = rand_augment(images, draws, magnitude).int() - expected.int()
            assert difference.abs().max() <= 1, name  # a strength in float32 may round otherwise


def test_loader_draws_operations_by_seed_and_epoch_and_leaves_all_else_as_it_is():
    split = Split(noise(50, 3), torch.arange(50), DATASETS["CIFAR10"])

    def epoch(number: int, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
        loader = Loader(split, 16, train=True, seed=3, **arguments)
        loader.set_epoch(number)
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    plain, labels = epoch(1)
    augmented, same_labels = epoch(1, randaugment=9)
    assert torch.equal(labels, same_labels)
    assert torch.equal(augmented, epoch(1, randaugment=9)[0])
    changed = (plain != augmented).flatten(1).any(1)
    assert 0.5 < changed.float().mean() < 1  # some draw the identity twice
    first, second = (Loader(split, 16, train=True, seed=s).draw_operations() for s in (3, 4))
    assert not torch.equal(first, second)
