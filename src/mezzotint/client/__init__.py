"""The SDK: Client and AsyncClient, thin over the same functions (exchange.py) and results (results.py).

    client = Client(base_url="http://127.0.0.1:8000", api_key="...")
    client.images.generate(model="emoji", prompt="a cat", num_inference_steps=8, seed=1).save("cat.png")

`base_url` may be any server that speaks the contract; what Mezzotint adds to an answer is optional here.
Beyond a plain request the server is asked for:

- `Idempotency-Key` on every request, the same on each retry;
- `Prefer: respond-async` (`submit`, `stream`): 202 with a RequestState at once, and `previews=N` next to it
  for previews; a server that answers 200 instead has done the work already, which is fine;
- `GET /dedicated/v1/requests/{id}`, `.../events` and `DELETE` as RequestState describes them; the events of a
  finished request are its last event.
"""

from __future__ import annotations

from mezzotint.client.asynchronous import AsyncClient, AsyncHandle
from mezzotint.client.blocking import Client, Handle
from mezzotint.client.exchange import ImageFields
from mezzotint.client.results import Completed, Event, GeneratedImage, Generation, Preview, Progress

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "Client",
    "Completed",
    "Event",
    "GeneratedImage",
    "Generation",
    "Handle",
    "ImageFields",
    "Preview",
    "Progress",
]
