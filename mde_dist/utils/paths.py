"""Paths as people write them, in options and in TOML files, and as they can be pasted back into a shell.

A shell expands neither `~` behind `=` nor anything within quotes, and nobody expands a file of TOML. So `local_path`
does it, for every path that `command.parse` reads; `as_typed` is its inverse. A URL is no path, and stays as it is.
"""

import os
import re
import shlex
from pathlib import Path

from mde_dist.utils.console import printable
from mde_dist.utils.errors import UserError
from mde_dist.utils.urls import is_remote

_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expanded(text: str, home: bool = True) -> str:
    """A path with its `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` is a plain `$`. Raises UserError.

    `home`: false leaves `~` and `~user` for `with_home`.

    A name that stands on the disk just as it is written, with a variable that nobody has set, is meant as it is.
    """
    if not text or "\0" in text:
        raise UserError(f"{text!r}: is no path; name a file or folder (is a variable in it empty?)")
    if is_remote(text) or text.startswith("pipe:"):
        return text
    if text.startswith("~") and home:
        user, sign, rest = text.partition("/")
        text = f"{as_typed(with_home(user))}{sign}{rest}"
    names = [found[2] or found[3] for found in _VARIABLE.finditer(text)]
    missing = [name for name in names if name and not os.environ.get(name)]
    if not missing:
        return _VARIABLE.sub(lambda found: found[1] or os.environ[found[2] or found[3]], text)
    if os.path.lexists(text):
        return text
    why = "is empty" if missing[0] in os.environ else "is not set"
    raise UserError(f"{text}: the variable {missing[0]} {why}; set it, or write $$ for a $ that is part of a name")


def with_home(path: str | Path) -> Path:
    """A path with its `~` or `~user` replaced. Raises UserError where nobody knows that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = str(path).split("/", 1)[0]
        why = "HOME is not set; set it" if user == "~" else f"this machine knows no user {user[1:]}"
        raise UserError(f"{path}: {why}, or write ./{path} for a folder of that name") from None


def local_path(text: str) -> Path:
    """A path as it is written in an option or a file -> the path that is meant. Raises UserError."""
    path = Path(expanded(text))
    return path.absolute() if str(path).startswith("~") else path  # of ./~ a Path drops what keeps it from being a home


def as_typed(path: str | os.PathLike[str]) -> str:
    """Text to write so that `local_path` gives this path; a URL as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else text.replace("$", "$$")


def whole_path(path: str | os.PathLike[str]) -> Path:
    """The same path from the root on. One that begins with a home is expanded where it is opened, and stays."""
    return Path(path) if os.fspath(path).startswith("~") else Path(path).absolute()


def command_line(module: str, *words: str | Path, launcher: str = "python", then: str = "") -> str:
    """A command of this package that can be pasted into a shell, from whatever folder.

    `words`: its arguments, of which those that are a Path are made whole; `then`: what the reader is to fill in.
    """
    typed = (as_typed(whole_path(word)) if isinstance(word, Path) else word for word in words)
    line = " ".join([launcher, "-m", f"mde_dist.{module}", *map(_quoted, typed)])
    return f"{line} {then}" if then else line


def _quoted(word: str) -> str:
    """A word for bash and zsh, in which nothing is left that a terminal would obey or cannot show."""
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + "".join(chr(b) if chr(b).isalnum() and b < 0x80 else f"\\x{b:02x}" for b in os.fsencode(word)) + "'"
