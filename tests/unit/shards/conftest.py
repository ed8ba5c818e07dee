"""The small data set of tests/unit/data, for tests of making shards."""

from tests.unit.data.conftest import (  # noqa: F401  fixtures
    encoded,
    golden_data,
    image_folder,
    model_config,
    one_sample,
    open_dataset,
    records,
    shards,
    tokenizer,
)
