"""Open sounds safely: 16-bit WAV files, converted to mono, at the model's sampling rate only (no resampling)."""

from __future__ import annotations

import os
import wave

import numpy as np

from ..errors import PromptError, reason
from ..schema import shortened
from .media_file import MediaFile, read_media

LONGEST = 600.0  # seconds


class AudioError(PromptError):
    """A sound that cannot be used: missing, damaged, at a wrong rate, too long."""


def open_audio(sound: np.ndarray | str | os.PathLike | MediaFile, rate: int) -> np.ndarray:
    """Return the waveform, float32 from -1 to 1, mono.

    Args:
        sound: the path of a 16-bit PCM WAV file, a `MediaFile`, or a mono waveform, which is assumed to be at `rate`.
        rate: the model's sampling rate in Hz.

    Raises:
        AudioError: the message names the file and what is wrong with it.
    """
    if not isinstance(sound, str | os.PathLike | MediaFile):
        try:
            waveform = np.asarray(sound, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise AudioError(
                f"{shortened(sound)} is not a waveform: give numbers, or the path of a WAV file"
            ) from error
        if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
            raise AudioError(f"a waveform of shape {waveform.shape} is not a mono sound of finite samples")
        return waveform
    content = sound if isinstance(sound, MediaFile) else read_media(sound, AudioError)
    name = content.name
    try:
        with wave.open(content.open(), "rb") as file:
            channels, width, found, frames = file.getparams()[:4]
            if not found:
                raise AudioError(f"{name} has a rate of 0 Hz: save it again")
            if frames / found > LONGEST:
                raise AudioError(f"{name} lasts {frames / found:.0f} s, over the limit of {LONGEST:.0f} s: cut it")
            data = file.readframes(frames)
    except AudioError:
        raise
    except Exception as error:  # wave.Error, EOFError, struct.error and others
        raise AudioError(f"{name} is not a PCM WAV file, or is damaged: {reason(error) or 'it ends early'}") from error
    if width != 2:
        raise AudioError(f"{name} has samples of {8 * width} bits: save it as 16-bit PCM")
    if found != rate:
        raise AudioError(
            f"{name} is at {found} Hz but the model takes {rate} Hz: resample it (sox in.wav -r {rate} out.wav)"
        )
    if not frames or len(data) != frames * width * channels:
        raise AudioError(f"{name} is cut short: {len(data)} bytes of {frames * width * channels}")
    return np.frombuffer(data, dtype="<i2").reshape(frames, channels).mean(axis=1, dtype=np.float32) / 32768.0
