"""Videos are decoded frame by frame, only the sampled frames are kept, and files that are not videos are refused by name."""

import wave

import numpy as np
import pytest
from PIL import Image

from workbench.vision.videos import Video, VideoError, open_video


def write_clip(path, frames=12, size=(48, 40), fps=6, codec="mpeg4"):
    """A clip whose frame n has the brightness 15 n."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), 15 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def every_third(total, fps, height, width):
    assert (total, round(fps), height, width) == (12, 6, 40, 48)
    return range(0, total, 3)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_the_sampled_frames_are_those_of_the_clip(tmp_path, name):
    video = open_video(write_clip(tmp_path / name), every_third)
    assert video.frames.shape == (4, 40, 48, 3)
    assert video.frames.mean(axis=(1, 2, 3)) == pytest.approx([0, 45, 90, 135], abs=4)
    assert (video.fps, video.indices, video.total) == (6.0, (0, 3, 6, 9), 12)


def test_frames_are_the_same_whatever_is_sampled(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    whole = open_video(clip, lambda total, *_: range(total))
    part = open_video(clip, lambda total, *_: [11, 2, 2])
    assert part.indices == (2, 11)
    assert np.array_equal(part.frames, whole.frames[[2, 11]])


def test_files_that_are_no_videos_are_refused_by_name(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("#EXTM3U\nhttp://127.0.0.1:9/other.mp4\n")
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    damaged = bytearray(clip)
    damaged[40 : len(damaged) - 800] = bytes(len(damaged) - 840)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name, words in (
        ("missing.mp4", "does not exist"),
        ("empty.mp4", "is not a video, or is damaged"),
        ("text.mp4", "is not a video, or is damaged"),
        ("cut.mp4", "is not a video, or is damaged|cut short"),
        ("damaged.mp4", "is not a video, or is damaged|is cut short|no frames"),
        ("sound.wav", "has no pictures: it is a wav file with audio"),
    ):
        with pytest.raises(VideoError, match=words) as raised:
            open_video(tmp_path / name, lambda total, *_: range(total))
        assert name in str(raised.value)


def test_bad_samples_and_bad_frames_are_refused(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    for indices in ([], [-1], [12]):
        with pytest.raises(VideoError, match="samples frames"):
            open_video(clip, lambda total, *_, indices=indices: indices)
    with pytest.raises(VideoError, match="17 is not a video"):
        open_video(17, every_third)
    pictures = [Image.new("RGB", (8, 6)), Image.new("RGB", (8, 7))]
    for frames, fps, words in (
        ([], 2.0, "a video of 0 frames"),
        (pictures, 2.0, r"sizes \[\(8, 6\), \(8, 7\)\]"),
        (np.zeros((2, 3, 3)), 2.0, r"frames are float64 \(2, 3, 3\)"),
        (pictures[:1], 0, "fps=0"),
        (pictures[:1], float("nan"), "fps=nan"),
    ):
        with pytest.raises(VideoError, match=words):
            Video.of_frames(frames, fps)
    made = Video.of_frames(pictures[:1] * 3, 2)
    assert open_video(made, every_third) is made
