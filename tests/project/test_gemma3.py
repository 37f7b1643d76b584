"""Test the stages on a second real model, Gemma 3 270M, where its packages are installed (extra `gemma`)."""

from __future__ import annotations

from typing import Any

import pytest

import layersurgery as ls
from layersurgery.checkpoints.model_packages import packaged_file

pytestmark = pytest.mark.weekly


@pytest.fixture(scope="module")
def frame() -> Any:
    try:
        packaged_file("gemma3-270m")
    except ls.SourceError as error:
        pytest.skip(str(error))
    return ls.analyses.stages("gemma3-270m", "pydoc", tokens=1024, context=256)


def test_the_first_full_attention_layer_is_needed_and_the_others_are_not(frame: Any) -> None:
    drop_kl = frame.set_index("layer").drop_kl_nats
    full = list(frame.layer[frame.layer_kind == "full attention"])
    assert full == [5, 11, 17]
    assert drop_kl[5] > 10 * drop_kl[4]


def test_an_outlying_first_layer_does_not_hide_the_fall_of_the_lens(frame: Any) -> None:
    assert frame.lens_kl_nats[0] > 3 * frame.lens_kl_nats[1]
    bend = frame.attrs["boundaries"][1]
    assert "the two fitted lines meet at layer 1 " not in bend["why"]
