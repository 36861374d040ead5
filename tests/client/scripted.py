"""A server that answers by a script, for faults and for answers of other servers."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mezzotint.images import encode

CAT: dict[str, Any] = {"model": "emoji", "num_inference_steps": 8, "prompt": "a cat"}
PIXELS = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
DEADLINE_S = 20.0


@dataclass
class Reply:
    """One answer of the scripted server; `cut` breaks the connection off in the middle of it."""

    status: int = 200
    body: bytes | str | dict[str, Any] = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    hang: bool = False


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Script:
    """An ASGI app that gives its replies in turn, the last one for ever, and notes what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.replies: list[Reply] = []
        self.seen: list[Seen] = []
        self.running = self.most_running = 0
        self.hold_until_running = 0

    def answers(self, *replies: Reply | dict[str, Any]) -> None:
        self.replies = [Reply(body=reply) if isinstance(reply, dict) else reply for reply in replies]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append(Seen(scope["method"], scope["path"], headers, body))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while self.most_running < self.hold_until_running:
                    await asyncio.sleep(0.001)
            await self.answer(
                self.replies.pop(0) if len(self.replies) > 1 else self.replies[0], receive, send
            )
        finally:
            self.running -= 1

    async def answer(self, reply: Reply, receive: Any, send: Any) -> None:
        if reply.hang:
            await receive()  # returns when the client hangs up
            return
        body = json.dumps(reply.body) if isinstance(reply.body, dict) else reply.body
        body = body.encode() if isinstance(body, str) else body
        kind = "application/json" if isinstance(reply.body, dict) else "text/plain"
        headers = {"content-type": kind, "content-length": str(len(body) + reply.cut)} | reply.headers
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Any, send: Any) -> None:
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


def item(form: str = "png", **more: Any) -> dict[str, Any]:
    data = base64.b64encode(encode(form, PIXELS, 8, 4)).decode()
    return {"seed": 5, "response_format": form, "b64_json": data, "width": 8, "height": 4} | more


def answer(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"created": 1, "id": "req_1", "data": list(items) or [item()], "warnings": []} | more


def error(status: int, code: str, **headers: str) -> Reply:
    body = {
        "error": {"message": f"{code} happened", "type": "x", "param": "model", "code": code},
        "detail": f"{code} happened",
        "request_id": "req_9",
    }
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def sse(*events: tuple[str, dict[str, Any]], cut: bool = False) -> Reply:
    text = "".join(f": hello\n\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return Reply(body=text, headers={"content-type": "text/event-stream"}, cut=cut)
