"""Chat templates that write today's date: the date is frozen, so that a conversation has the same tokens next year.

Such a template calls `strftime_now(format)`, a global of transformers' renderer. A macro of this name in front of the
template takes its place and fills in one fixed date. It is part of the template from then on: of the fingerprint of the
token cache, and of exported folders, for any reader.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from typing import Any

from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

_GLOBAL = "strftime_now"
_DIRECTIVE = re.compile(r"%[-_0^#]?\d*[A-Za-z]")
_USUAL = [f"%{letter}" for letter in "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZC"]
_PERCENT = "\uf8e3"  # stands for %% while directives are replaced


def freeze_date(tokenizer: Any, date: str | None, *, key: str) -> str | None:
    """Freeze the date that the chat template writes; return it, or None for a template that writes none.

    date: YYYY-MM-DD, None for today. key: of the date in the configuration, for the warning.
    Raises UserError for a date of another form.
    """
    day = None if date is None else read_date(date, key)
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or not _writes_date(template):
        return None
    if day is None:
        today = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template="{{ strftime_now('%Y-%m-%d') }}", tokenize=False
        )
        day = datetime.date.fromisoformat(today)
    tokenizer.chat_template = _macro(template, day) + template
    log.warning("the chat template writes the current date, which is frozen at %s; set %s to change it", day, key)
    return day.isoformat()


def read_date(text: str, key: str) -> datetime.date:
    """The date in YYYY-MM-DD; raises UserError for another form."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return datetime.date.fromisoformat(text)
    except ValueError:  # no such day
        pass
    raise UserError(f"{key}={text}: must be a date as YYYY-MM-DD, e.g. 2026-11-27")


def _writes_date(template: str) -> bool:
    """Whether any branch of the template uses the global."""
    if _GLOBAL not in template:
        return False
    from jinja2 import TemplateSyntaxError, meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """The tag of transformers around the texts of the assistant."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class WithoutConstants(NodeTransformer):
        """Jinja computes expressions of constants, for example `'a' * 10**10`, before it looks for names."""

        def visit_Const(self, node: Any) -> Any:
            return nodes.Name("constant", "load", lineno=node.lineno)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    try:
        return _GLOBAL in meta.find_undeclared_variables(WithoutConstants().visit(environment.parse(template)))
    except TemplateSyntaxError:  # the first row reports it
        return False


def _macro(template: str, day: datetime.date) -> str:
    """`strftime_now` as a macro, exact for the usual directives and for those that the template has in its text."""
    moment = datetime.datetime.combine(day, datetime.time())
    directives = dict.fromkeys([*_DIRECTIVE.findall(template), *_USUAL])
    values = {each: moment.strftime(each) for each in sorted(directives, key=len, reverse=True)}
    pairs = [("%%", _PERCENT), *((each, value) for each, value in values.items() if value != each), (_PERCENT, "%")]
    replaced = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    return f"{{%- macro {_GLOBAL}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}"
