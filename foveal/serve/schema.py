"""What a request body may hold, in OpenAI's words, and errors in OpenAI's shape. Every field is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic_core import from_json
from starlette.responses import JSONResponse

from ..errors import InputError
from .request import MOST_LOGPROBS, MOST_STOPS, Full, NotAllowed, TooLong, Unavailable

IGNORED = ("metadata", "user")
"""Accepted without effect: they describe the caller, not the answer."""

# Fields of OpenAI's API that are not served, with the values under which they change nothing: clients send those by habit.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_IN_MESSAGES = ("annotations", "audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls")


class ApiError(Exception):
    """An answer that is an error: HTTP status, one sentence, and the fields of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's `type` for the status."""
        known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, browser: bool = False) -> JSONResponse:
        """The answer; a `browser` without a key is told to ask for a password, which is the key."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="foveal"' if browser else "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: Exception, prompt: str) -> Exception:
    """What the worker says about a request it does not take, in HTTP's terms; `prompt` is the field that holds it."""
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param=prompt, code="context_length_exceeded")
    if isinstance(error, NotAllowed):
        return ApiError(400, str(error), param="foveal", code="not_allowed")
    if isinstance(error, Full):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Unavailable):
        return ApiError(503, "the engine takes no requests at the moment", code="unavailable", retry_after=1)
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_value")
    return error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """url: `data:image/png;base64,...`, or https where the server fetches from its host. detail "low": at most 512 pixels a side."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """An image in a message of the user, for a model that reads images."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One message of a conversation; "developer" is another word for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1, max_length=256)]

    @property
    def text(self) -> str:
        """The text of the content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def parts(self) -> list[dict[str, str]]:
        """The content as templates of models that read images take it."""
        if isinstance(self.content, str):
            return [{"type": "text", "text": self.content}]
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in self.content
        ]


class StreamOptions(_Strict):
    """include_usage: one more chunk before the end, with `usage` and no choices."""

    include_usage: bool = False


class Foveal(_Strict):
    """What this server adds. method, budget: from its allow-list. deadline: seconds until the request ends with an error.
    picture: chunks of a stream carry the keys kept per layer and KV head."""

    method: Annotated[str, Field(max_length=200)] | None = None
    budget: FiniteFloat | int | None = None
    deadline: Annotated[FiniteFloat, Field(gt=0)] | None = None
    picture: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Common(_Strict):
    """What both endpoints share; ranges and defaults are OpenAI's."""

    model: Annotated[str, Field(max_length=500)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    foveal: Foveal = Foveal()

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_Count = Annotated[int, Field(ge=1, le=2**31)]


class ChatRequest(Common):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool] | None = None


_Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]


class CompletionRequest(Common):
    """Body of `POST /v1/completions`: prompts are texts or lists of token ids."""

    prompt: str | _Ids | Annotated[list[str] | list[_Ids], Field(min_length=1, max_length=64)]
    max_tokens: _Count = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        return self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]


Body = TypeVar("Body", bound=Common)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """The checked request. Raises ApiError 400 that names the field: never a number that is not finite, never nesting past 200 levels."""
    try:
        raw = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON that can be read: {_short(error)}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "expected the body to be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(_cleaned(raw, kind))
    except ValidationError as error:
        raise _refusal(error) from None


def _cleaned(raw: dict[str, Any], kind: type[Common]) -> dict[str, Any]:
    """Without fields that say nothing: null, and neutral values of what is not served."""
    clean = {}
    for name, value in raw.items():
        if name in _REFUSED:
            # By type as well: 0 == False, and a client that says best_of = true means something else.
            if value is not None and not any(type(value) is type(v) and value == v for v in _REFUSED[name]):
                raise ApiError(
                    400, f"'{name}' is not served here: leave it out", param=name, code="unsupported_parameter"
                )
        elif value is not None or name not in kind.model_fields:
            clean[name] = value
    messages = clean.get("messages")
    if isinstance(messages, list):
        clean["messages"] = [_message(m, i) if isinstance(m, dict) else m for i, m in enumerate(messages)]
    return clean


def _message(raw: dict[str, Any], index: int) -> dict[str, Any]:
    for name in _REFUSED_IN_MESSAGES:
        if raw.get(name) not in (None, []):
            param = f"messages.{index}.{name}"
            raise ApiError(
                400, f"'{param}' is not served here: leave it out", param=param, code="unsupported_parameter"
            )
    return {name: value for name, value in raw.items() if name not in _REFUSED_IN_MESSAGES}


def _refusal(error: ValidationError) -> ApiError:
    """The most telling of pydantic's complaints; where a value may be of several kinds, the one that went deepest."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    # Names of alternatives ("list[str]", "constrained-str") stand in the location beside the fields' own.
    place = [str(p) for p in found["loc"] if isinstance(p, int) or str(p).isidentifier()]
    param = ".".join(p for p in place if p not in ("str", "int", "float"))[:80] or None
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])[:64]
        return ApiError(400, f"unknown field '{name}': leave it out", param=param or name, code="unknown_parameter")
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return ApiError(400, f"'{param}': {_short(found['msg'])}", param=param, code=code)


def _short(error: object) -> str:
    text = str(error).splitlines()[0] if str(error) else "it is damaged"
    return text[:200]
