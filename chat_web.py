"""Talk to the model in a browser, on this computer.

python chat_web.py                   the best checkpoint there is, on http://127.0.0.1:8000
python chat_web.py --recipe tiny     that of another recipe

The page needs nothing from elsewhere. Clients of OpenAI's API find the model at
http://127.0.0.1:8000/v1. Nobody outside this computer is answered; to talk to a model on another
machine of yours, start this there and `ssh -L 8000:127.0.0.1:8000 MACHINE` here.
"""

from __future__ import annotations

import argparse
import errno
import mimetypes
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from hamner.conversation import (
    HIGHEST_TEMPERATURE,
    Speaker,
    add_speaker_options,
    speaker_of,
)
from hamner.errors import UserError, run
from hamner.recipe import load_recipe
from web import completions, refusals
from web.answers import Line
from web.guard import Guard

HOST = "127.0.0.1"
PAGE = Path(__file__).resolve().parent / "web" / "page"


# ------------------------------------------------------------------------------ what is served


def make_app(line: Line, prompts: Sequence[str]) -> FastAPI:
    """The page and the API, without their guard. `prompts` are what the page proposes to say."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    refusals.use_in(app)
    app.include_router(completions.routes(line))

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        return {**describe(line.speaker), "prompts": list(prompts)}

    mimetypes.add_type("text/javascript", ".js")  # some Windows systems say that it is plain text
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def describe(speaker: Speaker) -> dict[str, Any]:
    """What the page says about the model, and begins with."""
    return {
        "checkpoint": str(speaker.path),
        "stage": speaker.stage,
        "step": speaker.step,
        "parameters": speaker.model.config.num_parameters(),
        "device": str(speaker.model.lm_head.weight.device),
        "context": speaker.model.config.max_position_embeddings,
        "temperature": speaker.sampling.temperature,
        "highest_temperature": HIGHEST_TEMPERATURE,
        "seed": speaker.sampling.seed,
        "system": speaker.system,
    }


class Server(uvicorn.Server):
    """A server that doesn't make anybody wait for an answer's end when it is to stop."""

    def __init__(self, line: Line, prompts: Sequence[str], port: int):
        self.line = line
        super().__init__(
            uvicorn.Config(
                Guard(make_app(line, prompts), port),
                lifespan="off",
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,  # seconds
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.line.close()
        await super().shutdown(sockets)


# ------------------------------------------------------------------------------ where


def listen(port: int) -> socket.socket:
    """A socket that listens on this computer's own address; port 0 is any that is free.

    Raises:
        UserError: the port is taken, or not for everyone.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is taken: try --port {free_port_after(port)}") from None
        reason = f"can't listen on port {port} ({error.strerror})"
        raise UserError(f"{reason}: try --port {free_port_after(8000)}") from None


def free_port_after(port: int) -> int:
    """The next free port, or where there is none near, any that is free."""
    for candidate in (*range(port + 1, min(port + 100, 2**16)), 0):
        try:
            with socket.create_server((HOST, candidate)) as free:
                return free.getsockname()[1]
        except OSError:
            continue
    raise UserError("no port is free")


# ------------------------------------------------------------------------------ the script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_speaker_options(parser)
    parser.add_argument("--port", type=int, default=8000, help="0 takes any (default: 8000)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with listen(arguments.port) as listener:
        port = listener.getsockname()[1]
        speaker = speaker_of(arguments)
        prompts = load_recipe(arguments.recipe).sft.prompts
        server = Server(Line(speaker), prompts, port)
        print(f"{speaker}\nhttp://{HOST}:{port}   (Ctrl-C stops it)", flush=True)
        server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    run(main)
