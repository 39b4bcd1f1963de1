"""Parameters as one writes them in a shell: ``batch_size=8 tasks=[A] team=007``, from text to values and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from forensics_lib.params import TEXT, Params

KEY = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=")
QUOTED = re.compile(r""""(?:\\.|[^"\\])*"|'(?:''|[^'])*'""")
PLAIN = re.compile(r"[\w./@%+:,~-]+")
NOTHING = ("", "null", "~")  # how a text parameter that may be left out is set to nothing
OPTIONAL = {name for name in TEXT if Params.model_fields[name].annotation is not str}


class SettingError(ValueError):
    """A setting that cannot be read, or a parameter that is set twice; the message says what to write."""


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["batch_size=8", "tasks=[A] team=007"]`` to a dict; values are read as YAML, those of text parameters stay text.

    An entry may hold several settings: a new one begins at ``KEY=`` outside of quotes and brackets, so that values may
    hold blanks.  Raises ``SettingError``.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        for key, text in _pairs(setting):
            value = _value(key, text)
            if key in found:
                raise SettingError(f"{key} is set twice, to {found[key]!r} and to {value!r}; leave one of them out")
            found[key] = value
    return found


def settings_text(values: dict[str, Any]) -> str:
    """Values as ``parse_settings`` reads them again from one string."""
    return " ".join(f"{key}={_written(value)}" for key, value in values.items())


def _written(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value not in NOTHING:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _pairs(setting: str) -> Iterator[tuple[str, str]]:
    setting = setting.strip()
    starts = list(KEY.finditer(setting))
    if not starts or starts[0].start():
        raise SettingError(
            f"a setting is KEY=VALUE, such as batch_size=8; found {setting!r} (a value with blanks stands in quotes: "
            "--set 'tasks=[A, B]')"
        )
    current = starts[0]
    for following in starts[1:]:
        if _complete(setting[current.end() : following.start()]):
            yield current[1], setting[current.end() : following.start()]
            current = following
    yield current[1], setting[current.end() :]


def _complete(text: str) -> bool:
    """Whether a value ends here: its quotes and brackets are closed."""
    text = text.strip()
    if text.startswith(('"', "'")):
        return QUOTED.fullmatch(text) is not None
    if text.startswith(("[", "{")):
        bare = QUOTED.sub("", text)
        return sum(map(bare.count, "[{")) <= sum(map(bare.count, "]}"))
    return True


def _value(key: str, text: str) -> Any:
    text = text.strip()
    try:
        quoted = QUOTED.fullmatch(text) is not None
        if quoted:
            text = str(yaml.safe_load(text))
        if key not in TEXT:
            return yaml.safe_load(text)
        if not quoted and text.startswith(('"', "'")):
            raise SettingError(f"{key}={text}: the quote is not closed")
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "not YAML"
        raise SettingError(
            f"{key}={text}: the value cannot be read ({why}); lists are [A, B], mappings {{name: value}}, true and false "
            f"are truth values; in a shell all of it stands in quotes: --set '{key}=...'"
        ) from None
    return None if key in OPTIONAL and not quoted and text in NOTHING else text
