"""The user of this process. In a container it may be a bare number, with no name, no home and no temporary folder."""

import getpass
import os
import tempfile

from mde_dist.utils.errors import UserError


def complete_user() -> None:
    """Put into the environment what a user lacks, before libraries look for it.

    Some do while they are imported: torch 2.8 to 2.10 for a name, torch 2.14 for a temporary folder. Others make a
    folder that is called `~`. The home becomes `/`, as container engines have it.
    """
    if os.path.expanduser("~") == "~":  # noqa: PTH111  Path's raises
        os.environ["HOME"] = "/"
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = f"uid_{os.getuid()}"
    try:
        temporary_folder()
    except UserError:
        # asked for even where nothing is compiled; it has to be there, and need not be writable
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/")


def temporary_folder() -> str:
    """A folder for temporary files. Raises UserError where none can be written."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp, the current one); set TMPDIR to one "
            "(docker run --tmpfs /tmp)"
        ) from None
