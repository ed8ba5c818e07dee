"""Several data sets as one: the YAML file, the numbers of samples, the fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ross_mcore.data.loader import Step
from ross_mcore.data.mixture import MixtureOrder
from ross_mcore.data.order import BlockOrder
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.sources import MixtureDataset, Source, epoch_counts, read_sources
from ross_mcore.errors import ShardError
from tests.unit.data.loading import decoded, open_loader

Open = Callable[..., ShardDataset]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """write(text) -> a YAML file beside the folders a and b."""
    for name in ("a", "b", "deep/a"):
        (tmp_path / name).mkdir(parents=True)

    def build(text: str) -> Path:
        path = tmp_path / "data.yaml"
        path.write_text(text)
        return path

    return build


def test_a_yaml_lists_data_sets_from_its_own_folder(write: Callable[[str], Path], tmp_path: Path) -> None:
    listed = (
        "- {path: a, weight: 1, template: plain}\n- {path: deep/a, weight: 0.5, name: c, image_aspect_ratio: pad}\n"
    )
    expected = [
        Source(tmp_path / "a", "a", weight=1, template="plain"),
        Source(tmp_path / "deep/a", "c", weight=0.5, image_aspect_ratio="pad"),
    ]
    assert read_sources(write(listed)) == expected
    indented = "".join(f"  {line}\n" for line in listed.splitlines())
    assert read_sources(write("datasets:\n" + indented)) == expected
    assert read_sources(tmp_path / "a") == [Source(tmp_path / "a", "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of data sets"),
        ("datasets: []", "expected a list of data sets"),
        ("dataset: []", "unknown key 'dataset', only `datasets` is read; did you mean datasets?"),
        ("- a", "data set 1: expected keys and values .path, name, weight, .* got 'a'"),
        ("- {path: a}\n- {path: b, wieght: 1}", "data set 2: unknown key 'wieght', only path, .* did you mean weight?"),
        ("- {weight: 1}", "data set 1: path must be text, got None"),
        ("- {path: a, name: 3}", "data set 1: name must be text, got 3"),
        ("- {path: missing}", "data set 'missing': path 'missing' is no folder"),
        ("- {path: a, weight: 0}", "data set 'a': weight must be a number above zero, got 0"),
        ("- {path: a, weight: true}", "weight must be a number above zero, got True"),
        ("- {path: a, epochs: .inf}", "data set 'a': epochs must be a number above zero, got inf"),
        ("- {path: a, epochs: '2'}", "epochs must be a number above zero, got '2'"),
        ("- {path: a, weight: 1, epochs: 1}", "data set 'a': weight and epochs exclude each other"),
        ("- {path: a, weight: 1}\n- {path: b, epochs: 1}", "'a' has weight and 'b' has epochs instead; give every"),
        ("- {path: a}\n- {path: b, epochs: 1}", "'b' has epochs and 'a' has none; give every"),
        ("- {path: a}\n- {path: deep/a}", "2 data sets are named 'a'; give each a `name`"),
        ("- {path: a, template: plan}", "data set 'a': template 'plan' is not one of .*; did you mean plain?"),
        ("- {path: a, image_aspect_ratio: wide}", "image_aspect_ratio 'wide' is not one of square, pad"),
        ("- {path: a", "cannot be read"),
    ],
)
def test_a_malformed_yaml_is_refused(text: str, message: str, write: Callable[[str], Path]) -> None:
    path = write(text)
    with pytest.raises(ShardError, match=message) as error:
        read_sources(path)
    assert str(path) in str(error.value)


def test_a_yaml_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="nowhere.yaml: no such file"):
        read_sources(tmp_path / "nowhere.yaml")


def test_counts_follow_from_weights_or_epochs_or_are_one_pass() -> None:
    def sources(**shares: list[float]) -> list[Source]:
        (key, values), *_ = shares.items()
        return [Source(Path(), str(place), **{key: value}) for place, value in enumerate(values)]

    assert epoch_counts(sources(weight=[1, 3]), [10, 30]) == (10, 30)
    assert epoch_counts(sources(weight=[3, 1]), [10, 30]) == (30, 10)
    assert epoch_counts(sources(epochs=[2, 0.5]), [10, 30]) == (20, 15)
    assert epoch_counts([Source(Path(), "a"), Source(Path(), "b")], [10, 30]) == (10, 30)


@pytest.fixture
def two(open_dataset: Open) -> MixtureDataset:
    """Two data sets of the same 23 samples, the second passed twice an epoch."""
    return MixtureDataset(["a", "b"], [open_dataset(), open_dataset()], [23, 46])


def test_samples_are_numbered_across_data_sets(two: MixtureDataset, open_dataset: Open) -> None:
    alone = open_dataset()
    assert len(two) == 46 and two.offsets.tolist() == [0, 23, 46]
    for number, local, source in ((0, 0, 0), (22, 22, 0), (23, 0, 1), (45, 22, 1)):
        sample, expected = decoded(two, number, 7), decoded(alone, local, 7)
        assert (sample.key, sample.source, sample.position) == (expected.key, source, 7)
        assert sample.tokens.tolist() == expected.tokens.tolist()
        assert len(sample.pixels) == len(expected.pixels)
        assert all(bool((x == y).all()) for x, y in zip(sample.pixels, expected.pixels))
    numbers = np.array([45, 0, 23, 22])
    assert two.keys(numbers) == alone.keys([22, 0, 0, 22])
    assert two.row_lengths(numbers).tolist() == alone.row_lengths(np.array([22, 0, 0, 22])).tolist()
    assert two.modality_lengths().tolist() == alone.modality_lengths().tolist() * 2
    assert two.first_picture(1000) == 1


def test_the_fingerprint_names_data_sets_and_shares(open_dataset: Open) -> None:
    part = open_dataset()
    alone = MixtureDataset(["a"], [part], [23])
    assert alone.fingerprint == part.reader.fingerprint and alone.passes_once
    others = [MixtureDataset(["a"], [part], [46])]
    others += [MixtureDataset(["a", "b"], [part, part], counts) for counts in ([23, 23], [23, 46], [46, 23])]
    assert len({mixture.fingerprint for mixture in (alone, *others)}) == 5
    renamed = MixtureDataset(["c", "d"], [part, part], [23, 46])
    assert renamed.fingerprint == others[2].fingerprint
    assert others[0].spec.template == others[1].spec.template == "qwen_2"


def read(dataset: MixtureDataset, count: int, **settings: int) -> list[Step]:
    orders = tuple(BlockOrder(size, which) for which, size in enumerate(dataset.sizes))
    sizes = {"global_batch_size": 6, "micro_batch_size": 1} | settings
    with open_loader(dataset, MixtureOrder(orders, dataset.counts, 5), packed=True, **sizes) as loader:
        return [next(loader) for _ in range(count)]


def samples_of(steps: list[Step]) -> list[tuple[int, str, int]]:
    return [(s.source, s.key, s.position) for step in steps for rows in step.micro_batches for row in rows for s in row]


def test_a_loader_reads_a_mixture_and_continues_in_the_middle(two: MixtureDataset) -> None:
    """Twelve steps, more than an epoch of 69 samples, are the same with workers, larger micro-batches, and resumed."""
    whole = read(two, 12)
    found = samples_of(whole)
    assert {source for source, _, _ in found} == {0, 1} and len(found) > 69
    first = [entry for entry in found if entry[2] < 69]
    assert sum(source for source, _, _ in first) == 46
    assert samples_of(read(two, 12, num_workers=1, micro_batch_size=3)) == found
    assert samples_of(read(two, 8, state=whole[3].cursor)) == samples_of(whole[4:])  # type: ignore[arg-type]


def test_an_order_over_other_data_is_refused(two: MixtureDataset) -> None:
    with pytest.raises(ValueError, match="the order is over 46 samples, the data set has 23"):
        orders = (BlockOrder(23, 0), BlockOrder(23, 1))
        open_loader(two.parts[0], MixtureOrder(orders, (1, 1), 0), global_batch_size=1, micro_batch_size=1)


def test_the_example_can_be_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "examples" / "data.yaml").read_text()
    for name in ("captions", "instructions"):
        (tmp_path / "shards" / name).mkdir(parents=True)
    (tmp_path / "data.yaml").write_text(text)
    captions, instructions = read_sources(tmp_path / "data.yaml")
    assert (captions.name, captions.weight, captions.template) == ("captions", 1, "plain")
    assert (instructions.name, instructions.weight, instructions.template) == ("llava", 3, None)
