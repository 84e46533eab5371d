"""Images of a request, from the bytes a client sent to what the model's processor makes of them. Nothing in them is trusted.

Only `data:` URLs are served, and those of hosts that the server was told of (`fetch`). Sizes are checked before anything is decoded,
formats are four, and whatever a decoder says becomes one sentence of our own that names the place in the request.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .schema import ApiError, ChatRequest, ImagePart
from .sight import Picture, Pictures, Sight
from .within import within

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_TOO_LONG = "the image takes too long to read: save it anew"
_DATA = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
_SCANS = 100  # of a progressive JPEG, each of which goes over all pixels; encoders write about ten
_LONGEST = 50  # times as long as it is wide, or the reverse: a processor that scales the short side would make a huge image of more
_LOW = 512  # pixels of a side at most where `detail` is "low": OpenAI's number


@dataclass(frozen=True)
class ImageLimits:
    """What the images of one request may be, and what those of all requests may hold. The values are this server's own choice.

    count: images. nbytes: of one file. pixels: width times height, known before decoding. memory: bytes of bodies that are being read,
    decoded images and what is made of them, all requests together. seconds: of work on one file's header, and again on its pixels.
    """

    count: int = 8
    nbytes: int = 10 << 20
    pixels: int = 4096 * 4096
    memory: int = 3 << 29
    seconds: float = 3.0

    @property
    def body(self) -> int:
        """Bytes a body may have for its images: base64 writes 3 bytes as 4."""
        return self.count * (4 * -(-self.nbytes // 3) + 1024)


class Room:
    """So many bytes for all requests together; who asks for more than is left is told to come back."""

    def __init__(self, most: int):
        self.most, self.held = most, 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Raises ApiError 429 where others hold too much, 413 where it is more than there is at all."""
        with self._lock:
            if nbytes > self.most:
                message = f"the images need {nbytes:,} bytes here, of which there are {self.most:,}: send fewer or smaller ones"
                raise ApiError(413, message, code="images_too_large")
            if self.held + nbytes > self.most:
                raise ApiError(
                    429, "images of other requests fill the room for them: try again", code="images_full", retry_after=1
                )
            self.held += nbytes

    def give(self, nbytes: int) -> None:
        """Bytes that are free again."""
        with self._lock:
            self.held -= nbytes

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[None]:
        """Taken inside."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.give(nbytes)


@dataclass(frozen=True)
class Place:
    """An image part of a request: `messages[i].content[j]`."""

    message: int
    index: int
    part: ImagePart

    @property
    def name(self) -> str:
        return f"messages[{self.message}].content[{self.index}]"

    @property
    def is_remote(self) -> bool:
        """Whether its URL names another place instead of holding the file."""
        return self.part.image_url.url[:5].lower() != "data:"

    @property
    def is_low(self) -> bool:
        """Whether a small copy of the image is enough."""
        return self.part.image_url.detail == "low"

    def refusal(self, why: str, code: str = "invalid_image") -> ApiError:
        """Error 400 about this image."""
        param = f"messages.{self.message}.content.{self.index}"
        return ApiError(400, f"{self.name}: {why}", param=param, code=code)


def places(request: ChatRequest) -> list[Place]:
    """Where a request has images."""
    return [
        Place(i, j, part)
        for i, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def check_places(found: Sequence[Place], request: ChatRequest, limits: ImageLimits, sees: bool) -> None:
    """Raise ApiError 400 for too many images, for one that no user sent, and for any where the model reads none (`sees` False)."""
    if not sees:
        raise found[0].refusal("this model reads no images: leave it out", "images_not_supported")
    if len(found) > limits.count:
        raise found[limits.count].refusal(f"a request may have {limits.count} images, and it has {len(found)}")
    for place in found:
        if request.messages[place.message].role != "user":
            raise place.refusal("an image can stand in a message of the user only")


def file_of(place: Place, limits: ImageLimits) -> bytes:
    """The file in a `data:` URL. Raises ApiError 400 for any other URL, and for base64 that is damaged or too long."""
    url, too_long = place.part.image_url.url, f"the file has more than {limits.nbytes:,} bytes: send a smaller one"
    head = _DATA.match(url)
    if head is None:
        why = ": this server was started without --image-hosts, so it fetches none" if place.is_remote else ""
        raise place.refusal("expected a URL that begins with data:image/png;base64, (or jpeg, webp, gif)" + why)
    if (len(url) - head.end()) // 4 * 3 > limits.nbytes + 2:
        raise place.refusal(too_long)
    try:
        data = binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except ValueError:  # binascii's own among them
        raise place.refusal("the base64 of the image is damaged") from None
    if not data or len(data) > limits.nbytes:
        raise place.refusal(too_long if data else "the file is empty")
    return data


def header(place: Place, data: bytes, limits: ImageLimits) -> Image:
    """The image with its size known and its pixels not yet decoded. Raises ApiError 400 for no image, or too large a one."""
    from PIL import Image

    try:
        image = within(limits.seconds, lambda: Image.open(io.BytesIO(data), formats=FORMATS))
        width, height = image.size
    except Image.DecompressionBombError:
        raise _too_many_pixels(place, limits) from None
    except TimeoutError:
        raise place.refusal(_TOO_LONG) from None
    except Exception:
        raise place.refusal("the file is no PNG, JPEG, WebP or GIF image that can be read") from None
    if width < 1 or height < 1:
        raise place.refusal("the image has no pixels")
    if width * height > limits.pixels:
        raise _too_many_pixels(place, limits)
    if max(width, height) > _LONGEST * min(width, height):
        raise place.refusal(f"the image is more than {_LONGEST} times as long as it is wide: send a part of it")
    # By the first bytes, for a JPEG of several images has another name.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _SCANS:
        raise place.refusal(f"the image is drawn in more than {_SCANS} scans: save it anew")
    return image


def _too_many_pixels(place: Place, limits: ImageLimits) -> ApiError:
    return place.refusal(f"the image has more than {limits.pixels:,} pixels: send a smaller one")


def pixels(place: Place, image: Image, limits: ImageLimits) -> Image:
    """Decoded, the first frame, turned as its file says, in red, green and blue. Raises ApiError 400 for a damaged file."""
    try:
        image = within(limits.seconds, _decoded, image)
        if place.is_low:
            image.thumbnail((_LOW, _LOW))
    except TimeoutError:
        raise place.refusal(_TOO_LONG) from None
    except Exception:
        raise place.refusal("the image is damaged: its pixels cannot be decoded") from None
    return image


def _decoded(image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255
        image = image.point(lambda level: level / 256).convert("L")
    return image.convert("RGB")


def decoded_bytes(sizes: Sequence[tuple[int, int]]) -> int:
    """What images of these sizes take: 4 bytes a pixel, 3 as the processor takes them, 16 more of the one that is being decoded (a
    WebP's; a JPEG's are 8)."""
    counts = [width * height for width, height in sizes]
    return 7 * sum(counts) + 16 * max(counts)


class Viewer:
    """Makes `Pictures` of a rendered prompt and the files of its images."""

    def __init__(self, sight: Sight, limits: ImageLimits, room: Room):
        self.sight, self.limits, self.room = sight, limits, room
        self._one = sight.render([{"role": "user", "content": [{"type": "image"}]}])

    def __call__(self, text: str, found: Sequence[Place], files: Sequence[bytes]) -> tuple[list[int], Pictures]:
        """The prompt's token ids with every image in its places, and the images. Raises ApiError 400 that names the image, 429 without
        room. What the pictures hold of the room they give back when they are let go."""
        opened = [header(place, data, self.limits) for place, data in zip(found, files, strict=True)]
        with self.room.lent(decoded_bytes([image.size for image in opened])):
            # Taken out of the list, so that what a file was decoded to goes when its copy in red, green and blue is there.
            images = [pixels(place, opened.pop(0), self.limits) for place in found]
            ids, pictures = self._prepared(text, found, images)
        for place, data, picture in zip(found, files, pictures, strict=True):
            digest = hashlib.sha256(b"low" if place.is_low else b"all")  # before the bytes, which the client chose
            digest.update(data)
            picture.digest = digest.digest()
        try:
            whole = Pictures(ids, pictures, self.sight.image)
        except InputError as error:
            raise ApiError(
                400, f"the images do not fit the prompt: {error}", param="messages", code="invalid_image"
            ) from None
        self.room.take(whole.nbytes)
        whole.lend(whole.nbytes, self.room.give)
        return ids, whole

    def _prepared(self, text: str, found: Sequence[Place], images: Sequence[Any]) -> tuple[list[int], list[Picture]]:
        if len(images) == 1:
            made = self._made(text, images, found[0])
            ids = made["input_ids"][0].tolist()
            return ids, [Picture(b"", made, ids.count(self.sight.image))]
        pictures = []
        for place, image in zip(found, images, strict=True):
            made = self._made(self._one, [image], place)
            pictures.append(Picture(b"", made, made["input_ids"][0].tolist().count(self.sight.image)))
        try:
            return self.sight.prepare(text, images)["input_ids"][0].tolist(), pictures
        except Exception:
            raise ApiError(
                400, "the images do not fit the model's processor together", param="messages", code="invalid_image"
            ) from None

    def _made(self, text: str, images: Sequence[Any], place: Place) -> dict[str, Any]:
        try:
            return self.sight.prepare(text, images)
        except Exception:
            width, height = images[0].size
            raise place.refusal(
                f"the model's processor does not take this image of {width} x {height} pixels"
            ) from None
