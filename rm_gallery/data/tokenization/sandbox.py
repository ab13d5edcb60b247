"""Sandbox: chat templates run within limits on time, on loop iterations and on the size of what they build.

A template comes from a model folder, so it may loop or grow without bound, by mistake or on purpose. It runs in
transformers' own environment with the hooks that Jinja has for sandboxes, and its syntax tree is changed where there is
no hook. The limits hold in every thread and process, and a text within them is exactly that of `apply_chat_template`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rm_gallery.data.tokenization.template_limits import (
    CHECKED,
    attributes_of,
    check_growth,
    check_operator,
    concat,
    counted,
    current,
    joined,
    limited_filter,
    sized,
    start_rendering,
    stored,
)


def _environment(library_environment: Any) -> Any:
    """The library's environment, with its globals and extensions, as one with limits."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])
        concat = staticmethod(concat)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operator(operator, left, right)
            return sized(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            current.meter.step()
            if getattr(__obj, "__name__", "") in CHECKED:
                given = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # of the template
                method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
                owner = [method.__self__] if isinstance(getattr(method, "__self__", None), str) else []
                args = tuple(check_growth(method.__name__, [*owner, *args], given)[len(owner) :])
            found = super().call(__context, __obj, *args, **kwargs)
            if isinstance(found, str):
                current.meter.build(len(found))
            elif isinstance(found, Namespace):
                sized(attributes_of(found))
            elif isinstance(found, dict) and not isinstance(getattr(__obj, "__self__", None), dict):
                sized(found)
            return found

    limited = library_environment.overlay()
    limited.__class__ = Limited
    limited.filters = {name: limited_filter(name, each) for name, each in library_environment.filters.items()}
    limited.filters |= {"_rm_counted": counted, "_rm_sized": sized, "_rm_stored": stored, "_rm_joined": joined}
    return limited


def _rewritten(source: Any) -> Any:
    """The syntax tree with every loop counted, and with the size of every list and every `~` checked."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def by(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Rewriter(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.iter = by("_rm_counted", node.iter)
            return node

        def visit_Assign(self, node: Any) -> Any:
            node = self.generic_visit(node)
            if isinstance(node.target, nodes.NSRef) or any(node.target.find_all(nodes.NSRef)):
                node.node = by("_rm_stored", node.node)
            return node

        def visit_Concat(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return by("_rm_joined", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

        def visit_Tuple(self, node: Any) -> Any:
            node = self.generic_visit(node)
            is_value = getattr(node, "ctx", "load") == "load" and any(node.find_all((nodes.Name, nodes.Call)))
            return by("_rm_sized", node) if is_value else node

        visit_List = visit_Dict = visit_Tuple

    return Rewriter().visit(source)


@lru_cache(maxsize=64)
def _stand_in(template: str) -> tuple[str, Callable[..., str]]:
    """(a template in place of this one, its function to render).

    The stand-in has the template as a comment only, since the library's compiler computes constants without limits.
    """
    from transformers.utils import chat_template_utils as library

    digest = hashlib.sha256(template.encode()).hexdigest()
    comment = template.replace("#}", "# }")
    key = f"{{# {digest} {comment} #}}{{{{ raise_exception('the chat template was evicted; try again') }}}}"
    environment = _environment(library._compile_jinja_template(key).environment)
    start_rendering()  # constants are computed here
    render = environment.from_string(_rewritten(environment.parse(template))).render

    def limited(*args: Any, **kwargs: Any) -> str:
        start_rendering()
        return str(render(*args, **kwargs))

    return key, limited


def limited_template(tokenizer: Any) -> Callable[..., Any]:
    """`tokenizer.apply_chat_template`, within the limits.

    The library prepares the variables and looks the compiled template up in its cache, where a stand-in of our own has
    a function to render within the limits. There are none for a class with its own method and for masks of assistants.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils as library

    apply = tokenizer.apply_chat_template
    own_method = (
        getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template
    )
    if own_method or not hasattr(library, "_compile_jinja_template"):
        return apply

    def limited(
        conversation: Any, tools: Any = None, documents: Any = None, chat_template: str | None = None, **settings: Any
    ) -> Any:
        template = tokenizer.get_chat_template(chat_template, tools)
        if not settings.get("return_assistant_tokens_mask"):
            key, render = _stand_in(template)
            library._compile_jinja_template(key).render = render
            template = key
        return apply(conversation, tools, documents, template, **settings)

    return limited


def limited_tokenizer(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose `apply_chat_template` has the limits, for the hooks of a custom class."""
    if tokenizer is None or tokenizer.chat_template is None:
        return tokenizer
    limited = copy.copy(tokenizer)
    limited.apply_chat_template = limited_template(limited)
    return limited
