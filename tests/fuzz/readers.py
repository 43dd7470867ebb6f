"""The readers that are fuzzed. Each takes mutated bytes, and must return the right result or raise one of the project's errors."""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, ModelError, Prompt, PromptError, TraceError, load_model
from workbench.comparison.noise_floor import NoiseFloor
from workbench.models.checkpoint import Checkpoint
from workbench.models.http_source import HttpSource
from workbench.models.sizes import check_sizes
from workbench.models.sources import FolderSource
from workbench.package_data import data_folder
from workbench.recording import Recording
from workbench.trace import Trace
from workbench.trace.files import TraceWriter
from workbench.vision.architectures import Features
from workbench.vision.audio import open_audio
from workbench.vision.feature_store import FeatureStore
from workbench.vision.images import open_image
from workbench.vision.media_file import MediaFile

LONGEST_MESSAGE = 1000
RECORDED = "digit-cards-turbomind-h100"


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        bases: valid inputs, which are mutated.
        read: reads an input; it raises AssertionError if the result is wrong.
        errors: what it may raise instead.
    """

    name: str
    bases: Callable[[], list[bytes]]
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]

    def check(self, data: bytes) -> None:
        """Read an input; raise AssertionError if the outcome is neither a right result nor an error with a short message."""
        try:
            self.read(data)
        except AssertionError:
            raise
        except self.errors as error:
            if not 0 < len(str(error).strip()) <= LONGEST_MESSAGE:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise AssertionError(f"raised {type(error).__name__}: {str(error)[:300]}") from error


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Change an input in one to four places: bits, bytes, numbers, cuts, repeats, insertions of characters that formats care about."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed) + 1)
        kind = dice.randrange(8)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << dice.randrange(8)
        elif kind == 1 and changed:
            changed[at % len(changed)] = dice.choice(b'\x00\xff\x7f\x80"{}[],:0-9e.\\')
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + dice.choice((1, 2, 8, 64, 1024))]
        elif kind == 4:
            changed[at:at] = changed[at : at + dice.choice((1, 8, 64, 1024))]
        elif kind == 5:
            changed[at:at] = dice.randbytes(dice.choice((1, 4, 16)))
        elif kind == 6:
            digits = [place for place, byte in enumerate(changed[: 1 << 16]) if 48 <= byte <= 57]
            if digits:
                place = dice.choice(digits)
                changed[place : place + 1] = dice.choice(_NUMBERS)
        else:
            changed[at : at + 4] = dice.choice(
                (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"null", b'"a"', b"[[[[")
            )
    return bytes(changed)


_NUMBERS = (
    b"-1",
    b"1e999",
    b"0.5",
    b"99999999999",
    b"9223372036854775808",
    b"1" * 400,
    b'"1"',
    b"null",
    b"true",
    b"[]",
    b"{}",
)


@cache
def folder() -> Path:
    """A folder for inputs, removed at the end of the process."""
    import atexit

    made = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def llama() -> Path:
    """A small Llama with a word-level tokenizer and a chat template."""
    path = save_llama(folder() / "llama").path
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 96)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}w5 {{ message['content'] }} w6 {% endfor %}w7"
    tokenizer.save_pretrained(path)
    return path


def _copy_with(name: str, data: bytes, source: Path) -> Path:
    """Return a copy of a model's folder in which one file is replaced."""
    target = folder() / f"copy-{name}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in source.iterdir():
        if file.name != name:
            (target / file.name).symlink_to(file)
    (target / name).write_bytes(data)
    return target


def _file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


# Checkpoints


def _checkpoint_bases() -> list[bytes]:
    path = folder() / "base.safetensors"
    save_file({"a": torch.zeros(3, 2), "b.weight": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}, path)
    return [path.read_bytes()]


def _read_checkpoint(data: bytes) -> None:
    source = folder() / "checkpoint"
    source.mkdir(exist_ok=True)
    (source / "model.safetensors").unlink(missing_ok=True)
    (source / "model.safetensors").write_bytes(data)
    checkpoint = Checkpoint(FolderSource(source))
    for name in checkpoint:
        mapped = checkpoint.get(name)
        read = checkpoint.read([name])[name]
        assert mapped.shape == read.shape
        assert mapped.contiguous().view(torch.uint8).equal(read.contiguous().view(torch.uint8)) if mapped.ndim else True


def _index_bases() -> list[bytes]:
    return [
        json.dumps(
            {"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
        ).encode()
    ]


def _read_index(data: bytes) -> None:
    source = folder() / "sharded"
    source.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, source / "one.safetensors")
    (source / "model.safetensors.index.json").write_bytes(data)
    checkpoint = Checkpoint(FolderSource(source))
    for name, tensor in checkpoint.read(list(checkpoint)).items():
        assert tensor.equal({"a": torch.zeros(3), "b": torch.ones(2)}[name]), "another tensor's bytes"


def _read_config(data: bytes) -> None:
    model = load_model(_copy_with("config.json", data, llama()))
    check_sizes(model.config, model.weights, "fuzzed")


def _read_tokenizer(data: bytes) -> None:
    model = load_model(_copy_with("tokenizer.json", data, llama()))
    assert all(isinstance(token, int) for token in model.chat_ids("w9 w10"))


def _read_template(data: bytes) -> None:
    model = load_model(_copy_with("chat_template.jinja", data, llama()))
    assert all(isinstance(token, int) for token in model.chat_ids("w9 w10"))


# Prompts, traces, recordings


@cache
def _prompt_files() -> tuple[bytes, bytes, str]:
    prompt = random_prompt()
    target = folder() / "prompt"
    target.mkdir(exist_ok=True)
    prompt.save(target / "p.json")
    (rows,) = target.glob("*.safetensors")
    return (target / "p.json").read_bytes(), rows.read_bytes(), prompt.digest


def _read_prompt(data: bytes) -> None:
    _prompt_files()
    path = folder() / "prompt" / "edited.json"
    path.write_bytes(data)
    prompt = Prompt.load(path)  # people edit these files: another valid prompt is a right result
    list(prompt.findings(vocab_size=97, hidden_size=48))


def _read_rows(data: bytes) -> None:
    _, original, digest = _prompt_files()
    (rows,) = (folder() / "prompt").glob("*.safetensors")
    try:
        rows.write_bytes(data)
        assert Prompt.load(folder() / "prompt" / "p.json").digest == digest, "damaged rows were read"
    finally:
        rows.write_bytes(original)


@cache
def _trace_file() -> bytes:
    path = folder() / "base-trace.safetensors"
    provenance = Trace.load(data_folder("data/runs") / RECORDED / "run.safetensors").provenance
    provenance = {**provenance, "dtype": "float32", "tokens": 5, "words": ["word"] * 5, "ranges": [], "spans": []}
    with TraceWriter(
        path, {"embed": (2, 4), "norm": (2, 4)}, torch.float32, torch.tensor([1, 3]), provenance
    ) as writer:
        for number, tap in enumerate(("embed", "norm")):
            writer.write(tap, torch.full((2, 4), float(number)))
    return path.read_bytes()


def _read_trace(data: bytes) -> None:
    trace = Trace.load(_file("trace.safetensors", data))
    assert trace.positions.tolist() == [1, 3], "other positions"
    for number, tap in enumerate(trace):
        assert trace[tap].equal(torch.full((2, 4), float(number))), "damaged states were read"


def _floor_bases() -> list[bytes]:
    return [(data_folder("data/runs") / RECORDED / "floor.safetensors").read_bytes()]


@cache
def _floor() -> NoiseFloor:
    return NoiseFloor.load(data_folder("data/runs") / RECORDED / "floor.safetensors")


def _read_floor(data: bytes) -> None:
    floor = NoiseFloor.load(_file("floor.safetensors", data))
    assert floor.positions.equal(_floor().positions)
    assert all(floor.errors[tap].equal(error) for tap, error in _floor().errors.items()), "a damaged floor was read"


def _record_bases() -> list[bytes]:
    return [(data_folder("data/runs") / RECORDED / "record.json").read_bytes()]


def _read_record(data: bytes) -> None:
    recording = Recording.load(_copy_with("record.json", data, data_folder("data/runs") / RECORDED))
    assert recording.record == json.loads(_record_bases()[0]), "a damaged record was read"


# Features, images, sounds


@cache
def _features() -> Features:
    return Features(torch.arange(24.0).view(6, 4), (2, 3), None, (1, 1))


_KEY = "ab" * 32


@cache
def _store() -> FeatureStore:
    return FeatureStore(folder() / "store")


def _entry_bases() -> list[bytes]:
    _store().put(_KEY, _features())
    return [(folder() / "store" / _KEY[:2] / f"{_KEY}.safetensors").read_bytes()]


def _read_entry(data: bytes) -> None:
    (folder() / "store" / _KEY[:2] / f"{_KEY}.safetensors").write_bytes(data)
    found = _store().get(_KEY)
    assert found is None or (found.rows.equal(_features().rows) and found.grid == (2, 3)), "a damaged entry was read"


def _image_bases() -> list[bytes]:
    image, found = Image.effect_noise((24, 16), 60).convert("RGB"), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        out = io.BytesIO()
        image.save(out, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found.append(out.getvalue())
    return found


def _read_image(data: bytes) -> None:
    image = open_image(MediaFile("fuzzed", data))
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.size[0] * image.size[1]


def _sound_bases() -> list[bytes]:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((np.sin(np.arange(400)) * 9000).astype("<i2").tobytes())
    return [out.getvalue()]


def _read_sound(data: bytes) -> None:
    sound = open_audio(MediaFile("fuzzed", data), 16_000)
    assert sound.ndim == 1
    assert np.isfinite(sound).all()


# HTTP answers: status and headers as JSON, then the body


def _answer_bases() -> list[bytes]:
    headers = {"content-range": "bytes 2-9/40", "content-length": "8", "etag": '"v1"'}
    return [json.dumps([206, headers]).encode() + b"\n" + bytes(range(2, 10))]


def _read_answer(data: bytes) -> None:
    head, _, body = data.partition(b"\n")

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

    try:
        status, headers = json.loads(head)
        headers = {str(key): str(value) for key, value in headers.items()}
        answer(httpx.Request("GET", "http://localhost"))
    except Exception:  # what no server can send
        return
    source = HttpSource("http://user:secret@localhost/model")
    source._client = httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True)
    try:
        found = source.read("model.safetensors", 2, 10)
    except ModelError as error:
        if "secret" in str(error):
            raise AssertionError("the password is printed") from error
        raise
    assert len(found) == 8
    assert found == body, "other bytes than the server sent"


# Settings: JSON of keyword arguments


def _settings_bases() -> list[bytes]:
    config = {
        "max_new_tokens": 4,
        "top_p": 0.5,
        "top_k": 3,
        "do_sample": True,
        "stop_token_ids": [1, 2],
        "random_seed": 3,
    }
    prompt = {"input_ids": [5, 6, 7], "embedding_ranges": [[0, 1]], "position_ids": [0, 1, 2]}
    return [json.dumps([config, prompt]).encode()]


def _read_settings(data: bytes) -> None:
    try:
        config, prompt = json.loads(data)
        config = {key: value for key, value in config.items() if key in GenerationConfig.__dataclass_fields__}
        prompt = {key: value for key, value in prompt.items() if key in Prompt.__dataclass_fields__}
    except Exception:  # not an input of these classes
        return
    made = GenerationConfig(**config)
    assert type(made.max_new_tokens) is int
    assert type(made.do_sample) is bool
    if "input_ids" in prompt:
        list(Prompt(**prompt).findings(vocab_size=97, hidden_size=48))


_OURS = (PromptError, ModelError, TraceError)
READERS = {
    reader.name: reader
    for reader in (
        Reader("checkpoint", _checkpoint_bases, _read_checkpoint, (ModelError,)),
        Reader("index", _index_bases, _read_index, (ModelError,)),
        Reader("config", lambda: [(llama() / "config.json").read_bytes()], _read_config, (ModelError,)),
        Reader("tokenizer", lambda: [(llama() / "tokenizer.json").read_bytes()], _read_tokenizer, (ModelError,)),
        Reader("template", lambda: [(llama() / "chat_template.jinja").read_bytes()], _read_template, (ModelError,)),
        Reader("prompt", lambda: [_prompt_files()[0]], _read_prompt, (PromptError,)),
        Reader("rows", lambda: [_prompt_files()[1]], _read_rows, (PromptError,)),
        Reader("trace", lambda: [_trace_file()], _read_trace, (TraceError,)),
        Reader("floor", _floor_bases, _read_floor, (TraceError,)),
        Reader("record", _record_bases, _read_record, _OURS),
        Reader("entry", _entry_bases, _read_entry, ()),
        Reader("image", _image_bases, _read_image, (PromptError,)),
        Reader("sound", _sound_bases, _read_sound, (PromptError,)),
        Reader("answer", _answer_bases, _read_answer, (ModelError,)),
        Reader("settings", _settings_bases, _read_settings, (ValueError,)),
    )
}


def inputs(reader: Reader, seed: int) -> Iterator[bytes]:
    """Yield mutated inputs without end."""
    dice, bases = random.Random(seed), reader.bases()
    while True:
        yield mutate(dice.choice(bases), dice)
