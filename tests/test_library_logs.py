"""Other libraries are quiet inside `quiet_libraries`, and as before after it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub.utils as hub
import pytest
from transformers.utils import logging as transformers_logging

from layersurgery.library_logs import quiet_libraries


def settings() -> dict[str, Any]:
    return {
        "levels": {
            name: logging.getLogger(name).level
            for name in ("transformers", "accelerate", "huggingface_hub", "datasets", "urllib3")
        },
        "bars": [
            transformers_logging.is_progress_bar_enabled(),
            not hub.are_progress_bars_disabled(),
            not datasets.are_progress_bars_disabled(),
        ],
        "warnings": list(warnings.filters),
    }


def is_quiet() -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("shown", stacklevel=1)
    levels = settings()["levels"].values()
    return not caught and not any(settings()["bars"]) and min(levels) >= logging.ERROR


@pytest.fixture(
    params=[(True, True, True), (False, True, False), (True, False, True), (False, False, False)], autouse=True
)
def before(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Set the bars of the three libraries to each combination, and the levels to values that are no defaults."""
    original = settings()
    libraries = [
        (transformers_logging.enable_progress_bar, transformers_logging.disable_progress_bar),
        (hub.enable_progress_bars, hub.disable_progress_bars),
        (datasets.enable_progress_bars, datasets.disable_progress_bars),
    ]

    def apply(bars: Any, levels: dict[str, int]) -> None:
        for on, (enable, disable) in zip(bars, libraries, strict=True):
            (enable if on else disable)()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

    apply(request.param, {"transformers": logging.INFO, "accelerate": logging.NOTSET, "datasets": logging.DEBUG})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield settings()
    apply(original["bars"], original["levels"])


def test_settings_are_restored(before: dict[str, Any]) -> None:
    assert not is_quiet()
    with quiet_libraries():
        assert is_quiet()
    assert settings() == before


def test_also_after_an_exception(before: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt), quiet_libraries():
        raise KeyboardInterrupt
    assert settings() == before


def test_also_nested(before: dict[str, Any]) -> None:
    with quiet_libraries():
        outer = settings()
        with quiet_libraries(logging.CRITICAL):
            assert is_quiet()
            assert logging.getLogger("transformers").level == logging.CRITICAL
        assert settings() == outer
        assert is_quiet()
    assert settings() == before


def test_also_when_blocks_end_in_another_order(before: dict[str, Any]) -> None:
    def quiet_generator() -> Iterator[None]:
        with quiet_libraries(logging.CRITICAL):
            yield

    with quiet_libraries():
        generator = quiet_generator()
        next(generator)
    assert is_quiet()
    generator.close()  # type: ignore[attr-defined]
    assert settings() == before


def test_a_library_that_is_imported_inside(before: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets")
    with quiet_libraries():
        assert settings()["bars"] == [False, False, before["bars"][2]]
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        with quiet_libraries():
            assert is_quiet()
    assert settings() == before


def test_a_logger_does_not_become_louder() -> None:
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with quiet_libraries():
        assert logging.getLogger("transformers").level == logging.CRITICAL
