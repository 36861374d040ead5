"""Input pictures that a request names by URL: fetched only where `allow_image_urls` says so, and from nowhere
but public addresses.

A host's name is resolved once. Every address that it has must be public, and the connection goes to one of
those very addresses: a name that resolves to something else a moment later changes nothing. No redirect is
followed, no proxy is used, and bytes, seconds and fetches at a time are limited.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

from mezzotint.errors import InvalidRequestError

FETCH_S = 10.0
"""Within which all pictures of a request must have come."""
MAX_FETCHES = 4
"""Requests whose pictures are fetched at a time; others wait, within their seconds."""
PORTS = (80, 443)
_SCHEMES = ("http://", "https://")
_EMBEDS_IPV4 = ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
"""Networks of IPv6 that lead to any address of IPv4."""

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host; OSError if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a zone, such as fe80::1%eth0
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if any(parsed in ipaddress.ip_network(network) for network in _EMBEDS_IPV4):
            return False
    return parsed.is_global and not parsed.is_multicast


class PictureFetcher:
    """Fetches pictures; the arguments but `max_bytes` are for tests, which have no public address."""

    def __init__(
        self,
        max_bytes: int,
        *,
        is_allowed: Callable[[str], bool] = is_public,
        resolve: Resolve = resolve,
        ports: Sequence[int] | None = PORTS,
        seconds: float = FETCH_S,
    ) -> None:
        """`max_bytes` is for all pictures of a request together."""
        self._max_bytes = max_bytes
        self._is_allowed = is_allowed
        self._resolve = resolve
        self._ports = ports
        self._seconds = seconds
        self._turns = asyncio.Semaphore(MAX_FETCHES)

    async def fetched(self, pictures: Sequence[str | bytes], param: str) -> list[str | bytes]:
        """The same with the file in place of each URL; InvalidRequestError says why one cannot be had."""
        if not any(_is_url(picture) for picture in pictures):
            return list(pictures)
        left, found = self._max_bytes, list(pictures)
        try:
            async with asyncio.timeout(self._seconds), self._turns:
                for index, picture in enumerate(pictures):
                    if isinstance(picture, str) and _is_url(picture):
                        found[index] = data = await self._fetch(picture, param, left)
                        left -= len(data)
        except TimeoutError:
            raise _failed(param, f"did not come within {self._seconds:g} s") from None
        return found

    async def _fetch(self, text: str, param: str, most: int) -> bytes:
        url, host, address = await self._checked(text, param)
        shown = f"[{address}]" if ":" in address else address
        pinned = url.copy_with(host=shown)
        headers = {"host": url.netloc.decode("ascii"), "accept-encoding": "identity", "accept": "image/*"}
        extensions = {"sni_hostname": host}
        try:
            async with (
                httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=self._seconds) as client,
                client.stream("GET", pinned, headers=headers, extensions=extensions) as response,
            ):
                self._require_peer(response, param)
                return await _read(response, param, most)
        except (httpx2.HTTPError, OSError, ValueError) as error:
            raise _failed(param, f"could not be fetched ({type(error).__name__})") from None

    async def _checked(self, text: str, param: str) -> tuple[httpx2.URL, str, str]:
        """The URL, its host's name, and the address to connect to."""
        try:
            url = httpx2.URL(text)
        except (httpx2.InvalidURL, ValueError, TypeError):
            raise _refused(param, "is no valid URL") from None
        port = url.port or (443 if url.scheme == "https" else 80)
        if not url.host or url.userinfo:
            raise _refused(param, "must be a URL with a host and without a user's name")
        if self._ports is not None and port not in self._ports:
            raise _refused(param, f"must be at port {' or '.join(map(str, self._ports))} (got {port})")
        host = url.raw_host.decode("ascii").strip("[]")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            raise _failed(param, "names a host that cannot be found") from None
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise _refused(param, "leads to an address that is not public")
        return url, host, addresses[0]

    def _require_peer(self, response: httpx2.Response, param: str) -> None:
        """Looks again at the address that the connection was made to."""
        stream: Any = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if not peer or not self._is_allowed(str(peer[0])):
            raise _refused(param, "leads to an address that is not public")


async def _read(response: httpx2.Response, param: str, most: int) -> bytes:
    if response.is_redirect:
        raise _refused(param, "answers with a redirect, which is not followed; send the URL that it leads to")
    if response.status_code != httpx2.codes.OK:
        raise _failed(param, f"could not be fetched (status {response.status_code})")
    parts, size = list[bytes](), 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > most:
            raise _failed(param, f"is too large: the pictures of a request have at most {most} bytes more")
        parts.append(part)
    return b"".join(parts)


def _is_url(picture: str | bytes) -> bool:
    return isinstance(picture, str) and picture[:8].lower().startswith(_SCHEMES)


def _refused(param: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {text}", code="image_url_refused", param=param)


def _failed(param: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} {text}; send the picture itself, as a data URL or as base64",
        code="image_fetch_failed",
        param=param,
    )
