"""Keep other libraries quiet while this one loads models and reads text, and restore their settings afterwards."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .errors import LayerSurgeryWarning

_LOGGERS = [
    logging.getLogger(name)
    for name in (
        *(
            "accelerate",
            "bitsandbytes",
            "datasets",
            "fsspec",
            "httpx",
            "huggingface_hub",
            "lm_eval",
            "transformers",
            "urllib3",
        ),
    )
]
_lock = threading.Lock()
# The levels of the `with` blocks that are open. A block in a generator can end after the block around it.
_open_levels: list[int] = []
_effective_levels: dict[logging.Logger, int] = {}
# Restores the settings from before the first of them.
_restore = ExitStack()


@contextmanager
def quiet_libraries(level: int = logging.ERROR) -> Iterator[None]:
    """Hide the warnings, log and progress bars of other libraries while the `with` block runs.

    Args:
        level: the lowest level of log records that are still shown.
    """
    # The first import of transformers sets the level of its logger, so it must come before.
    from transformers.utils import logging as transformers_logging

    with _lock:
        if not _open_levels:
            _hide_warnings_and_bars(transformers_logging)
            for logger in _LOGGERS:
                _effective_levels[logger] = logger.getEffectiveLevel()
                _restore.callback(logger.setLevel, logger.level)
        # Importing datasets is slow; code that does not import it shows no bars of it.
        datasets = sys.modules.get("datasets")
        if datasets and not datasets.are_progress_bars_disabled():
            _restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        _open_levels.append(level)
        _set_levels()
    try:
        yield
    finally:
        with _lock:
            _open_levels.remove(level)
            if _open_levels:
                _set_levels()
            else:
                _restore.close()


def _hide_warnings_and_bars(transformers_logging: Any) -> None:
    from huggingface_hub import utils as hub

    own = (
        action
        for action, message, category, module, _ in warnings.filters
        if issubclass(LayerSurgeryWarning, category) and message is None and module is None
    )
    action: Any = next(own, "default")
    _restore.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    warnings.simplefilter(action, LayerSurgeryWarning)  # this package's own stay as they were
    # The Hub's bars are restored after those of transformers, whose functions turn them on and off too.
    _restore.callback(hub.disable_progress_bars if hub.are_progress_bars_disabled() else hub.enable_progress_bars)
    if transformers_logging.is_progress_bar_enabled():
        _restore.callback(transformers_logging.enable_progress_bar)
    transformers_logging.disable_progress_bar()


def _set_levels() -> None:
    for logger in _LOGGERS:
        logger.setLevel(max(*_open_levels, _effective_levels[logger]))


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Hide what bitsandbytes says at each product with an 8-bit weight: that the input is rounded to float16."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
