"""TWA in the Trainer of Hugging Face, over the Trainer's own `checkpoint-*` folders.

    python examples/huggingface_trainer.py [--report_to tensorboard]

A small BERT, made from its config, learns which package of Python's standard library 32 words come
from.
"""

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from twa import Recipe

HEAD_STEPS, SAVE_STEPS, TWA_STEPS = 400, 25, 60
BATCH, WORDS, VOCABULARY = 32, 32, 1000
PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest")


def passages() -> list[dict]:
    """32 words each, rare ones as 0, and the number of the package that they come from."""
    library = Path(tempfile.__file__).parent
    texts = [
        [
            word
            for file in (library / name).rglob("*.py")
            for word in re.findall(r"\w+", file.read_text())
        ]
        for name in PACKAGES
    ]
    common = Counter(word for text in texts for word in text).most_common(VOCABULARY - 1)
    number = {word: i for i, (word, _) in enumerate(common, start=1)}
    data = [
        {"input_ids": [number.get(word, 0) for word in text[i : i + WORDS]], "labels": label}
        for label, text in enumerate(texts)
        for i in range(0, len(text) - WORDS, WORDS)
    ]
    return [data[i] for i in torch.randperm(len(data))]


class TWATrainer(Trainer):
    """Logs the weight of each checkpoint in the model, to whatever `report_to` names."""

    def log(self, logs, *arguments):
        if self.optimizer is not None:
            twa = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            alpha = twa.averaging_weights()
            logs = logs | {f"alpha/{i}": weight for i, weight in enumerate(alpha.tolist())}
        super().log(logs, *arguments)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--report_to", default="none")
    report_to = parser.parse_args().report_to
    set_seed(0)
    folder = Path(tempfile.mkdtemp())
    data = passages()
    few = len(data) // 5
    test, validation, train = data[:few], data[few : 2 * few], data[2 * few :]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=len(PACKAGES),
    )
    model = BertForSequenceClassification(config)

    def arguments(name: str, **others) -> TrainingArguments:
        return TrainingArguments(
            str(folder / name),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH,
            save_steps=SAVE_STEPS,
            logging_steps=SAVE_STEPS,
            report_to=report_to,
            disable_tqdm=True,
            **others,
        )

    # An ordinary run at a constant learning rate leaves the window of checkpoints.
    constant = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    head = arguments("head", max_steps=HEAD_STEPS, **constant)
    Trainer(model, head, train_dataset=train).train()
    checkpoints = [
        folder / "head" / f"checkpoint-{i}" for i in range(200, HEAD_STEPS + 1, SAVE_STEPS)
    ]

    # The Trainer takes the recipe's optimizer; by default its learning rate decays linearly.
    trainer = TWATrainer(
        model,
        arguments("twa", max_steps=TWA_STEPS),
        train_dataset=validation,
        eval_dataset=test,
        compute_metrics=lambda found: {
            "accuracy": (found.predictions.argmax(1) == found.label_ids).mean()
        },
    )
    recipe = Recipe(
        model,
        checkpoints,
        lambda: trainer.evaluate(validation)["eval_loss"],
        steps=TWA_STEPS,
        samples=len(validation),
        granularity="model",
    )
    trainer.optimizer = recipe.optimizer()
    before = trainer.evaluate()
    trainer.train()
    recipe.finish()
    after = trainer.evaluate()
    print(
        f"held-out loss {before['eval_loss']:.4f} -> {after['eval_loss']:.4f}, "
        f"accuracy {before['eval_accuracy']:.2%} -> {after['eval_accuracy']:.2%}"
    )


if __name__ == "__main__":
    main()
