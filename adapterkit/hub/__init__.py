"""The Hugging Face Hub: names of what lies there, its headers alone, what is there, getting it, and sending it.

Facts about the client: huggingface_hub 1.31 to 2.x; it is imported only when something is asked of the Hub.
"""

from adapterkit.hub.locate import located, resolve
from adapterkit.hub.names import HubId, hub_id, is_hub_id, on_hub, place_of

__all__ = ["HubId", "hub_id", "is_hub_id", "located", "on_hub", "place_of", "resolve"]
