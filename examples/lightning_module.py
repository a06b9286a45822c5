"""TWA in a LightningModule: gradients clipped by the Trainer, resumed by `ckpt_path`.

    python examples/lightning_module.py

SGD on scikit-learn's Digits saves a `.ckpt` after each epoch; TWA trains their average.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset, random_split

from twa import TWA
from twa.checkpoints import average

HEAD_EPOCHS, TWA_EPOCHS = 8, 4


class Digits(lightning.LightningModule):
    """Trains by SGD, or by TWA if it is given checkpoints; the rest does not change."""

    def __init__(self, checkpoints: list[Path] | None = None, steps: int = 0):
        super().__init__()
        self.checkpoints, self.steps = checkpoints, steps
        self.network = nn.Sequential(
            nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )

    def forward(self, images):
        return self.network(images)

    def configure_optimizers(self):
        if self.checkpoints is None:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        optimizer = TWA(self, self.checkpoints)  # It starts from the checkpoints' mean.
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, self.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, _):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        logits = self(images)
        self.log("loss", cross_entropy(logits, labels), on_epoch=True)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), on_epoch=True)


def loaders() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 16
    train, held_out = random_split(TensorDataset(images, torch.tensor(labels)), [0.7, 0.3])
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(held_out, 512)


def trainer(folder: Path, epochs: int, **options) -> lightning.Trainer:
    keep_all = ModelCheckpoint(folder, "{epoch:02}", save_top_k=-1)
    return lightning.Trainer(
        max_epochs=epochs, callbacks=[keep_all], logger=False, enable_progress_bar=False, **options
    )


def main():
    lightning.seed_everything(0)
    folder = Path(tempfile.mkdtemp())
    train_loader, held_out = loaders()

    # An ordinary run at a constant learning rate leaves the window of checkpoints.
    trainer(folder / "head", HEAD_EPOCHS).fit(Digits(), train_loader)
    checkpoints = sorted((folder / "head").glob("*.ckpt"))[1:]

    def evaluate(model: Digits) -> dict[str, float]:
        update_bn(train_loader, model.cpu())  # the statistics belong to the data
        return trainer(folder, 1).validate(model, held_out, verbose=False)[0]

    model = Digits()
    model.load_state_dict(average(checkpoints, model))
    before = evaluate(model)
    # The Trainer clips the gradient of the model before TWA projects it. After two epochs the run
    # stops and is resumed: the Trainer restores the model and TWA's coefficients.
    for epochs, path in ((2, None), (TWA_EPOCHS, folder / "twa" / "epoch=01.ckpt")):
        model = Digits(checkpoints, TWA_EPOCHS * len(train_loader))
        clipped = trainer(folder / "twa", epochs, gradient_clip_val=1.0)
        clipped.fit(model, train_loader, ckpt_path=path)
    alpha = model.optimizers().optimizer.averaging_weights()
    after = evaluate(model)

    print("averaging weights:", [round(weight, 2) for weight in alpha.tolist()])
    print(
        f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}, "
        f"accuracy {before['accuracy']:.2%} -> {after['accuracy']:.2%}"
    )


if __name__ == "__main__":
    main()
