"""The Hugging Face Hub: repository ids, headers by range requests, listings, downloads and uploads.

Works with huggingface_hub 1.31 to 2.x, which is imported only when the Hub is used.
"""

from adapterkit.hub.locate import locate_all, resolve
from adapterkit.hub.names import HubId, as_hub_id, hub_repo, input_path, is_hub_id

__all__ = ["HubId", "as_hub_id", "hub_repo", "input_path", "is_hub_id", "locate_all", "resolve"]
