"""Chat models: an OpenAI-compatible endpoint or a checkpoint folder behind one interface.

Client libraries and torch are imported on the first request.
"""

from rm_gallery.core.models.base_chat_model import BaseChatModel, ChatError
from rm_gallery.core.models.openai_chat_model import OpenAIChatModel

__all__ = ["BaseChatModel", "ChatError", "OpenAIChatModel"]
