"""What a server allows its clients; every limit stands here once."""

from __future__ import annotations

from dataclasses import dataclass

#: interfaces that can be switched on
APIS = ("openai", "a1111")
#: bytes of a request's body, and of all bodies that are held at once
MAX_BODY, MAX_BODIES = 12 << 20, 192 << 20
#: seconds in which a client must have sent its body
BODY_SECONDS = 30.0
#: characters of a prompt; a text encoder reads a few hundred of them
MAX_PROMPT = 10_000
#: images of one request
MAX_IMAGES = 16
#: pixels of an image that a client sends; a small file can hold many
MAX_PIXELS = 4096 * 4096
#: images that are decoded at once
DECODERS = 2
#: characters of any other text field
MAX_TEXT = 200
#: fields that an answer lists as not applied
MAX_IGNORED = 32
#: connections at once; more are refused with 503
MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class Settings:
    """How a server is started.

    Attributes:
        apis: of ``APIS``.
        api_key: what clients must send, as a bearer token or a basic password; None takes everyone.
        deadline: seconds after which a request is dropped.
        local: whether it listens on this machine's own address alone; then other names of it are refused, so that a
            web page cannot reach it by a name of its own (DNS rebinding).
    """

    apis: tuple[str, ...] = APIS
    api_key: str | None = None
    deadline: float = 300.0
    local: bool = True
