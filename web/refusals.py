"""What is said where a request isn't answered: one sentence, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as RoutingException


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal(status: int, message: str, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, kind, code), status)


def sentence(error: RequestValidationError) -> str:
    """All that is wrong with a request; what was sent isn't repeated."""
    problems = []
    for problem in error.errors():
        if problem["type"] == "json_invalid":
            return f"the request is not JSON: {problem['ctx']['error']}"
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
        problems.append(f"{place}: {message}" if place else message)
    return "; ".join(problems)


def use_in(app: FastAPI) -> None:
    """Let an app answer in this way whatever it refuses."""

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(400, sentence(error))

    @app.exception_handler(RoutingException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        return refusal(500, "the server failed; its terminal says how")
