"""TWA by its defaults never leaves a model worse than it found it: three small cases."""

import functools
from dataclasses import replace

import pytest
from safety import CASES, SafetyBench

from training.loop import evaluate
from twa.files.checkpoints import last_means, load_into

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory):
    """The finished SGD run of a case, as many epochs long as asked for."""

    @functools.cache
    def made(name: str, epochs: int) -> SafetyBench:
        folder = tmp_path_factory.mktemp("safety")
        case = replace(CASES[name], epochs=epochs, saves=1, apart=1, test=100)
        return SafetyBench(case, 1, folder / "run", folder)

    return made


@pytest.mark.parametrize(
    ("name", "epochs", "granularity"),
    [
        ("Digits PreResNet20", 20, "model"),
        ("Digits PreResNet20", 20, "layer"),
        ("Digits cnn", 60, "channel"),
    ],
)
def test_the_end_is_no_worse_than_any_simple_average_on_images_that_nobody_saw(
    bench_of, name, epochs, granularity
):
    bench = bench_of(name, epochs)
    window = bench.window(epochs)
    counts = (1, 5, epochs)
    simple = []
    for mean in last_means(window, counts, bench.model.state_dict()):
        load_into(bench.model, mean)
        simple.append(float(bench.judged()[0][0].mean()))

    entry = bench.twa(f"{epochs} auto {granularity} 3")
    assert entry["held out"]["end"] <= 1.05 * min(simple)
    assert entry["held out"]["end"] <= 1.05 * entry["held out"]["start"]
    assert max(entry["after"]) <= 1.5 * entry["held out"]["start"]


def test_of_text_a_window_counts_once(tmp_path):
    case = replace(CASES["Text gpt"], epochs=1, saves=1, images=16, held_out=4, test=4)
    bench = SafetyBench(case, 1, tmp_path / "run", tmp_path)
    for judge, each in zip(bench.judges, bench.judged(), strict=True):
        assert each.shape == (2, judge.count)
        plain = evaluate(bench.model, judge, bench.amp)
        losses, hits = each.mean(1)
        assert losses.item() == pytest.approx(plain["loss"], rel=1e-5)
        assert 100 * hits.item() == pytest.approx(plain["accuracy"], rel=1e-5)
