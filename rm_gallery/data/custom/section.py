"""The `data` section as a custom class gets it: `config.max_length`, `config["max_length"]`, `config.get(...)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from rm_gallery.data.formats import FormatConfig


class DataSection(Mapping[str, Any]):
    """Read-only; sections inside it read the same way. Keys on how a row is read have their defaults."""

    def __init__(self, values: Any = None) -> None:
        """values: a mapping, a configuration dataclass, or None for the defaults alone."""
        given = asdict(values) if is_dataclass(values) and not isinstance(values, type) else dict(values or {})
        self._values: dict[str, Any] = {**asdict(FormatConfig()), **given}

    def __getitem__(self, key: str) -> Any:
        return _Section.of(self._values[key])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the data section has no key {name!r}")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"DataSection({self._values})"


class _Section(DataSection):
    """A section inside it, with nothing added."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(value) if isinstance(value, Mapping) else value
