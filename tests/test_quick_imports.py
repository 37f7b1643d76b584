"""Test that garbage collection is paused in the block, and is afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from layersurgery.quick_imports import quick_imports


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collection_is_restored_also_after_an_error(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled() == was_enabled
        with pytest.raises(ImportError), quick_imports():
            raise ImportError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
