"""A server's settings, and the limits for its clients."""

from __future__ import annotations

from dataclasses import dataclass

#: interfaces that can be switched on
APIS = ("openai", "a1111")
#: maximum bytes of a request's body, and of all bodies in memory at once
MAX_BODY, MAX_BODIES = 12 << 20, 192 << 20
#: seconds within which a client must send its body
BODY_SECONDS = 30.0
#: maximum characters of a prompt; a text encoder reads a few hundred of them
MAX_PROMPT = 10_000
#: maximum images of one request
MAX_IMAGES = 16
#: maximum pixels of an image from a client; a small file can contain many
MAX_PIXELS = 4096 * 4096
#: maximum number of images that are decoded at once
DECODERS = 2
#: maximum characters of any other text field
MAX_TEXT = 200
#: maximum number of fields that an answer lists as not applied
MAX_IGNORED = 32
#: maximum simultaneous connections; more are refused with 503
MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        apis: of ``APIS``.
        api_key: key that clients must send, as a bearer token or a basic password; None serves everyone.
        deadline: seconds after which a request is dropped.
        local: whether it listens on this machine's own address only; it then refuses requests for other host names, so
            that a web page cannot reach it through its own domain (DNS rebinding).
    """

    apis: tuple[str, ...] = APIS
    api_key: str | None = None
    deadline: float = 300.0
    local: bool = True
