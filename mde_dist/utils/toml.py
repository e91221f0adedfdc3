"""Values as TOML, as `--config` reads them."""

import json
from collections.abc import Iterable
from typing import Any


def dump_toml(values: Iterable[tuple[str, Any]]) -> str:
    """(`section.field`, value) pairs as TOML; values as they are in a config, or as `as_json` has them."""
    sections: dict[str, list[str]] = {}
    for name, value in values:
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {_toml(value)}\n")
    return "\n".join((f"[{section}]\n" if section else "") + "".join(lines) for section, lines in sections.items())


def _toml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple | list) else value
    if isinstance(plain, list) and all(isinstance(item, int) for item in plain) and plain:
        plain = "x".join(map(str, plain))
    return json.dumps(plain if isinstance(plain, bool | int | float | list) else str(plain), ensure_ascii=False)
