"""TWA in a plain training loop: float16 with a `GradScaler`, accumulated and clipped gradients.

    python examples/plain_loop.py

SGD on scikit-learn's Digits saves a checkpoint after each epoch; TWA trains their average.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset, random_split

from twa import Recipe

HEAD_EPOCHS, TWA_EPOCHS, BATCH, ACCUMULATE = 8, 3, 32, 2

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
half = device.type == "cuda"  # The scaler does nothing elsewhere.


def loaders() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, held_out = random_split(TensorDataset(images, torch.tensor(labels)), [0.7, 0.3])
    return DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(held_out, 512)


def network() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(block(1, 16), block(16, 32), pool, nn.Flatten(), nn.Linear(32, 10))


def train_epoch(model, loader, optimizer, scaler, scheduler=None):
    """The same for SGD and for TWA."""
    model.train()
    optimizer.zero_grad()  # an odd batch of the epoch before may have left a gradient
    for step, (images, labels) in enumerate(loader, start=1):
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = cross_entropy(model(images.to(device)), labels.to(device)) / ACCUMULATE
        scaler.scale(loss).backward()
        if step % ACCUMULATE == 0:
            scaler.unscale_(optimizer)
            # The gradient of the model is clipped, before TWA projects it.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()


@torch.no_grad()
def evaluate(model, loader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss = correct = count = 0
    for images, labels in loader:
        logits, labels = model(images.to(device)), labels.to(device)
        loss += cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, correct / count


def main():
    torch.manual_seed(0)
    train_loader, held_out = loaders()
    model = network().to(device)

    # An ordinary run at a constant learning rate leaves the window of checkpoints.
    folder = Path(tempfile.mkdtemp())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    for epoch in range(HEAD_EPOCHS):
        train_epoch(model, train_loader, sgd, scaler)
        torch.save(model.state_dict(), folder / f"{epoch}.pt")

    # The recipe starts from the average with the lowest loss on training images, …
    def training_loss() -> float:
        update_bn(train_loader, model, device)
        return evaluate(model, train_loader)[0]

    checkpoints = [folder / f"{epoch}.pt" for epoch in range(2, HEAD_EPOCHS)]
    steps = TWA_EPOCHS * (len(train_loader) // ACCUMULATE)
    samples = len(train_loader.dataset)
    recipe = Recipe(model, checkpoints, training_loss, steps=steps, samples=samples)
    optimizer = recipe.optimizer()
    update_bn(train_loader, model, device)
    before = evaluate(model, held_out)

    # … makes an optimizer like any other, and keeps the best of its iterates.
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(TWA_EPOCHS):
        train_epoch(model, train_loader, optimizer, scaler, scheduler)
    recipe.finish()
    update_bn(train_loader, model, device)
    after = evaluate(model, held_out)

    alpha = optimizer.averaging_weights().mean(0)  # over the channels
    print("averaging weights:", [round(weight, 2) for weight in alpha.tolist()])
    print(
        f"held-out loss {before[0]:.4f} -> {after[0]:.4f}, "
        f"accuracy {before[1]:.2%} -> {after[1]:.2%}"
    )


if __name__ == "__main__":
    main()
