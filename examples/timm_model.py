"""TWA on a model of timm, over the files that timm's `CheckpointSaver` writes.

    python examples/timm_model.py [MODEL]

A small ResNet learns scikit-learn's Digits.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, accuracy
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset, random_split

from twa import TWA

HEAD_EPOCHS, TWA_EPOCHS, SIZE = 6, 2, 32
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaders() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = interpolate(images, size=SIZE, mode="bilinear")
    train, held_out = random_split(TensorDataset(images, torch.tensor(labels)), [0.7, 0.3])
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(held_out, 1024)


def train_epoch(model, loader, optimizer, scheduler=None):
    """The same for SGD and for TWA."""
    model.train()
    for images, labels in loader:
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


@torch.no_grad()
def evaluate(model, loader) -> tuple[float, float]:
    """Loss and accuracy, of all images in one batch."""
    model.eval()
    ((images, labels),) = loader
    logits, labels = model(images.to(device)), labels.to(device)
    return cross_entropy(logits, labels).item(), accuracy(logits, labels)[0].item()


def main():
    torch.manual_seed(0)
    name = sys.argv[1] if len(sys.argv) > 1 else "test_resnet"
    train_loader, held_out = loaders()
    model = timm.create_model(name, num_classes=10, in_chans=1).to(device)

    # An ordinary run at a constant learning rate leaves the window of checkpoints.
    folder = Path(tempfile.mkdtemp())
    sgd = create_optimizer_v2(model, "sgd", lr=0.02, weight_decay=5e-4)
    saver = CheckpointSaver(model, sgd, checkpoint_dir=folder, max_history=HEAD_EPOCHS)
    for epoch in range(HEAD_EPOCHS):
        train_epoch(model, train_loader, sgd)
        saver.save_checkpoint(epoch)

    # TWA starts from the mean of the window. Batch norm's statistics are re-estimated for it.
    checkpoints = [folder / f"checkpoint-{epoch}.pth.tar" for epoch in range(2, HEAD_EPOCHS)]
    optimizer = TWA(model, checkpoints)
    update_bn(train_loader, model, device)
    before = evaluate(model, held_out)
    steps = TWA_EPOCHS * len(train_loader)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(TWA_EPOCHS):
        train_epoch(model, train_loader, optimizer, scheduler)
    update_bn(train_loader, model, device)
    after = evaluate(model, held_out)
    print(
        f"held-out loss {before[0]:.4f} -> {after[0]:.4f}, "
        f"accuracy {before[1]:.2f}% -> {after[1]:.2f}%"
    )


if __name__ == "__main__":
    main()
