"""Console warnings, and losses of single data sets."""

from __future__ import annotations

from ross_mcore.data.sample import IgnoredLabels
from ross_mcore.engine.losses import DataSetLosses
from ross_mcore.reporting.averages import means_by_data_set
from ross_mcore.reporting.console import ignored_warning


def test_a_wrong_template_is_reported_with_share_keys_and_remedy() -> None:
    measured = ignored_warning(IgnoredLabels(512, 128, ["a", "b"], from_index=False), "v1")
    counted = ignored_warning(IgnoredLabels(1000, 11, ["c"], from_index=True), "qwen_2")
    assert measured is not None and counted is not None
    assert "25.0% of the samples have no label (128 of 512 tokenized" in measured
    assert "the first are a, b." in measured and "--template v1 does not fit" in measured
    assert "1.1% of the samples have no label (11 by the index)" in counted


def test_a_few_samples_without_labels_give_no_warning() -> None:
    assert ignored_warning(IgnoredLabels(1000, 10, ["a"], from_index=True), "v1") is None
    assert ignored_warning(IgnoredLabels(3, 0, [], from_index=False), "v1") is None


def test_losses_of_a_data_set_are_weighted_by_labels_and_images() -> None:
    steps = [
        {"a": DataSetLosses(2, 30, 1, 1.0, 0.5), "b": DataSetLosses(1, 5, 0, 3.0, None)},
        {"a": DataSetLosses(1, 10, 3, 2.0, 0.1), "b": DataSetLosses(0, 0, 0, None, None)},
    ]
    assert means_by_data_set(steps) == {
        "samples/a": 3,
        "lm_loss/a": (30 + 20) / 40,
        "vm_loss/a": (0.5 + 0.3) / 4,
        "samples/b": 1,
        "lm_loss/b": 3.0,
    }
    assert means_by_data_set([]) == means_by_data_set([{}]) == {}
