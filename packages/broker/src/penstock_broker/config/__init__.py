"""The broker's settings: what there is (settings), where values come from (load), the document of them."""

from __future__ import annotations

from penstock_broker.config.load import Loaded, load
from penstock_broker.config.settings import ENV_PREFIX, SECTIONS, ClusterSettings, Settings, TopicSettings

__all__ = ["ENV_PREFIX", "SECTIONS", "ClusterSettings", "Loaded", "Settings", "TopicSettings", "load"]
