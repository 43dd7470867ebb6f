"""Open videos safely: a file is decoded frame by frame, and only the frames are kept that the model's processor samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PromptError, reason
from ..schema import shortened
from .images import MAX_PIXELS, open_image
from .media_file import MediaFile, read_media

MAX_FRAMES = 200_000  # about two hours at 30 frames/s; every frame up to the last sampled one is decoded
MAX_KEPT = 1 << 30  # bytes of the sampled frames


class VideoError(PromptError):
    """A video that cannot be used: missing, damaged, without frames, too large."""


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes:
        frames: uint8 `[frames, height, width, 3]`, RGB.
        fps: frames per second of the video that they were sampled from.
        indices: which frames of that video these are.
        total: number of frames of that video.
    """

    frames: np.ndarray
    fps: float
    indices: tuple[int, ...]
    total: int

    @classmethod
    def of_frames(cls, frames: Sequence[Any] | np.ndarray, fps: float) -> Video:
        """A video of frames that are used as they are; `frames` are images (PIL or paths) or an array of the above shape.

        Raises:
            VideoError: no frames, frames of different sizes, or a rate that is not positive.
        """
        if not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise VideoError(f"fps={shortened(fps)}: give a positive number of frames per second")
        if not isinstance(frames, np.ndarray):
            images = [open_image(frame) for frame in frames]
            sizes = {image.size for image in images}
            if len(sizes) != 1:
                raise VideoError(
                    f"a video of {len(images)} frames with sizes {sorted(sizes)}: give at least one, all of one size"
                )
            frames = np.stack([np.asarray(image) for image in images])
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise VideoError(f"frames are {frames.dtype} {frames.shape}: give uint8 [frames, height, width, 3]")
        return cls(frames, float(fps), tuple(range(len(frames))), len(frames))


Sample = Callable[[int, float, int, int], Sequence[int]]
"""Returns the indices of the frames to keep, given number of frames, frames per second, height and width."""


def open_video(video: Video | str | os.PathLike | MediaFile, sample: Sample) -> Video:
    """Return the frames of a video that `sample` chooses; a `Video` is returned as it is.

    Raises:
        VideoError: the message names the file and what is wrong with it.
    """
    if isinstance(video, Video):
        return video
    if not isinstance(video, str | os.PathLike | MediaFile):
        raise VideoError(f"{shortened(video)} is not a video: give the path of a file, or Video.of_frames(frames, fps)")
    file = video if isinstance(video, MediaFile) else read_media(video, VideoError)
    import av

    try:
        # The content decides the format; network protocols and playlists of other files are never opened.
        with av.open(file.open(), mode="r", options={"protocol_whitelist": "pipe"}) as container:
            if not len(container.streams):
                raise VideoError(
                    f"{file.name} is damaged or cut short: it is a {container.format.name} file without contents"
                )
            if not container.streams.video:
                raise VideoError(f"{file.name} has no pictures: it is {_described(container)}")
            return _read(file, container, sample)
    except VideoError:
        raise
    except Exception as error:  # av.FFmpegError and its kinds, ValueError, MemoryError
        raise VideoError(f"{file.name} is not a video, or is damaged: {reason(error)}") from error


def _described(container: Any) -> str:
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    return f"a {container.format.name} file with {kinds}"


def _read(file: MediaFile, container: Any, sample: Sample) -> Video:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    width, height = stream.width, stream.height
    if not width or not height or width * height > MAX_PIXELS:
        raise VideoError(f"{file.name} has frames of {width} x {height} pixels: the limit is {MAX_PIXELS:,}")
    rate = float(stream.average_rate or stream.base_rate or 0)
    if not 0 < rate < 1e6:
        raise VideoError(f"{file.name} has no frame rate: convert it to MP4")
    # The count in a header may be missing or wrong; packets are counted, which decodes nothing.
    total = sum(packet.size > 0 for packet in container.demux(stream))
    if not total:
        raise VideoError(f"{file.name} has no frames")
    if total > MAX_FRAMES:
        raise VideoError(f"{file.name} has {total:,} frames, over the limit of {MAX_FRAMES:,}: cut it")
    indices = sorted({int(index) for index in sample(total, rate, height, width)})
    if not indices or indices[0] < 0 or indices[-1] >= total:
        raise VideoError(
            f"{file.name}: the processor samples frames {indices[:3]}... of {total}: change its fps or num_frames"
        )
    if len(indices) * width * height * 3 > MAX_KEPT:
        raise VideoError(
            f"{file.name}: {len(indices)} sampled frames of {width} x {height} take over {MAX_KEPT:,} bytes: make it smaller or shorter"
        )
    container.seek(0, stream=stream)
    wanted, kept = set(indices), []
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            kept.append(frame.to_ndarray(format="rgb24"))
        if number == indices[-1]:
            break
    if len(kept) != len(indices):
        raise VideoError(f"{file.name} is cut short: {len(kept)} of {len(indices)} sampled frames can be decoded")
    if len({frame.shape for frame in kept}) != 1:
        raise VideoError(f"{file.name} changes the size of its frames: convert it to one size")
    return Video(np.stack(kept), rate, tuple(indices), total)
