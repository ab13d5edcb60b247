"""Chat models: an OpenAI-compatible endpoint or a checkpoint folder, behind one call.

Importing them loads no client library and no torch; a model does so when it is first asked.
"""

from rm_gallery.core.models.base_chat_model import BaseChatModel, ChatError
from rm_gallery.core.models.openai_chat_model import OpenAIChatModel

__all__ = ["BaseChatModel", "ChatError", "OpenAIChatModel"]
