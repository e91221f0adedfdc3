"""URLs that hold keys: a signed one in its query, others as user and password. Nothing that is kept or said has them.

A config has a URL without its key, and so has all that is written of it. The whole URL stands in the environment of
this process, where only its user can read it, and child processes inherit it; `remote.py` alone asks for it.
"""

import os
import re
from urllib.parse import quote

SIGNED_URLS = "MDE_DIST_SIGNED_URLS"
"""Environment variable: whole URLs, with blanks between them. What names one of them without its key means it."""


def is_remote(location: str) -> bool:
    """True for a URL (of whatever scheme), as opposed to a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def public_url(location: str) -> str:
    """A URL without query, fragment, user and password; a local path as it is."""
    if not is_remote(location):
        return location
    scheme, _, rest = location.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        rest = rest[host.rindex("@") + 1 :]
    elif re.search(r"^[^\[]*:.*\D", host):  # that is no port: a password which holds what should have been quoted
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def hide_key(location: str) -> str:
    """The public form of a location; the whole one is kept for `whole_url`, in child processes as well."""
    public = public_url(location)
    if public != location:
        others = (url for url in os.environ.get(SIGNED_URLS, "").split() if _same(url) != _same(location))
        os.environ[SIGNED_URLS] = " ".join([*others, _without_blanks(location)])
    return public


def whole_url(location: str) -> str:
    """A location with its key, where that is known. Never to be shown."""
    known = {_same(url): url for url in os.environ.get(SIGNED_URLS, "").split()}
    return known.get(_same(location), location) if public_url(location) == location else location


def without_keys(text: str) -> str:
    """A text with each URL in it in its public form."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda found: public_url(found[0]), text)


def _same(location: str) -> str:
    return _without_blanks(public_url(location)).rstrip("/")


def _without_blanks(location: str) -> str:
    return re.sub(r"\s", lambda found: quote(found[0]), location)
