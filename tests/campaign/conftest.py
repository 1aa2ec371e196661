"""What light runs put in the plug-in table stays in the tests of this folder."""

from __future__ import annotations

import sys

import pytest

from retrain import plugins


@pytest.fixture(autouse=True)
def the_plugin_table_is_as_it_was():
    before = {kind: dict(names) for kind, names in plugins.TABLE.items()}
    yield
    for kind, names in before.items():
        plugins.TABLE[kind].clear()
        plugins.TABLE[kind].update(names)
    sys.modules.pop("light", None)
