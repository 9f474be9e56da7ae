"""Discovery: which plugins are installed, which of them work, and what they bring."""

from graftwork_registry.catalog import Catalog
from graftwork_registry.rows import ComponentRow, PluginRow

__all__ = ["Catalog", "ComponentRow", "PluginRow"]
