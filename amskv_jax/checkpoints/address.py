"""Addresses on the Hugging Face hub: ``hf://user/repository[@revision][/path]``."""

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote

from amskv_jax.errors import UsageError

SCHEME = "hf://"
FORM = "hf://user/repository[@revision][/path][#sha256=checksum]"
_ADDRESS = re.compile(
    # One slash is left where the text went through a path of this machine.
    r"hf:/{1,2}(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/@#]+))?"
    r"(/(?P<path>[^#]*))?(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Address:
    """What lies on the hub.

    Attributes:
      repo: "user/repository".
      path: of a file or folder in it; empty for the whole.
      revision: branch, tag or commit; empty for the newest.
      sha256: of a file, in hexadecimal; empty if it is not known.
    """

    repo: str
    path: str = ""
    revision: str = ""
    sha256: str = ""

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> "Address":
        """Read an address.

        Raises:
          UsageError: if it is none.
        """
        match = _ADDRESS.fullmatch(str(text))
        path = (match["path"] or "").strip("/") if match else ""
        if match is None or {"", ".", ".."} & set(path.split("/") if path else ()):
            raise UsageError(f"{text} is no address of the Hugging Face hub: expected {FORM}")
        revision = unquote(match["revision"] or "")
        return cls(match["repo"], path, revision, match["sha256"] or "")

    def __str__(self) -> str:
        revision = "@" + self.revision.replace("/", "%2F") if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        checksum = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{SCHEME}{self.repo}{revision}{path}{checksum}"

    def inside(self, name: str) -> "Address":
        """Return the address of what lies in this folder."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name, sha256="")


def is_address(source: object) -> bool:
    """Return whether this names something on the hub, and not on this machine."""
    return isinstance(source, str | os.PathLike) and str(source).startswith("hf:/")
