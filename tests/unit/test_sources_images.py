"""Images in a dataset: where they come from, what is refused, and the tokens that stand for them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kdmesh.errors import DataError, InvalidRequest
from kdmesh.images import data_url, decoded, describe_image, encoded, image_digest
from kdmesh.models.images.layouts import Sight
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.types import TokenSequence
from kdmesh_trainer.builders.vision import no_images
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig, ImagesConfig
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, save_image_processor
from tests.support.tiny_vision_tokens import IMAGE_TOKEN, VISION_START, save_tokenizer

PICTURE = png(40, 24, seed=1)
ANSWER = {"role": "assistant", "content": "It shows noise."}


def asked(*parts: object) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def write(directory: Path, *rows: dict[str, Any]) -> Path:
    (directory / "pictures").mkdir(exist_ok=True)
    (directory / "pictures" / "one.png").write_bytes(PICTURE)
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def images_of(file: Path, **cfg: Any) -> list[bytes]:
    """Digests of all images, in order."""
    chats = open_dataset(ChatFile(path=file), images=ImagesConfig(**cfg))()
    return [image.digest for chat in chats for message in chat.messages for image in message.images]


def test_every_form_names_the_same_image(tmp_path: Path) -> None:
    text = base64.b64encode(PICTURE).decode()
    forms = [
        {"type": "image", "image": "pictures/one.png"},
        {"type": "image", "path": "pictures/one.png"},
        {"type": "image", "base64": text},
        {"type": "image", "image": {"base64": text}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image"},
    ]
    rows: list[dict[str, Any]] = [{"messages": [asked(form), ANSWER]} for form in forms]
    rows[-1]["images"] = ["pictures/one.png"]
    assert images_of(write(tmp_path, *rows)) == [image_digest(PICTURE)] * len(forms)


def test_a_parquet_file_holds_the_bytes_of_its_images(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": [{"text": "x"}]}]
    messages[1]["content"][0]["type"] = "text"  # type: ignore[index]
    table = pa.Table.from_pylist([{"messages": messages, "images": [{"bytes": PICTURE, "path": None}]}])
    pq.write_table(table, tmp_path / "train.parquet")  # type: ignore[no-untyped-call]
    assert images_of(tmp_path / "train.parquet") == [image_digest(PICTURE)]


@pytest.mark.parametrize(
    ("part", "cfg", "sentence"),
    [
        ({"image": "https://example.com/a.png"}, {}, r"example.com/a.png' is on the web, and .*allow_urls is false"),
        ({"image": "../secret.png"}, {}, r"'../secret.png' leads out of /.*; data.images.root may name another"),
        ({"image": "/etc/passwd"}, {}, r"'/etc/passwd' leads out of"),
        ({"image": "pictures/none.png"}, {}, r"cannot read the image /.*none.png: No such file"),
        ({"image": "train.jsonl"}, {}, r"train.jsonl: \d+ bytes are not an image of PNG, JPEG, WEBP$"),
        ({"image": "pictures/one.png"}, {"max_pixels": 900}, r"has 40 x 24 pixels; the most allowed is 900 in all"),
        ({"image": "pictures/one.png"}, {"max_mib": 0.001}, r"an image has \d+ bytes; the most allowed is 1048"),
        ({"base64": "%%%"}, {}, r"an image is not base64"),
        ({"image": 7}, {}, r"an image must be a path, a data URL or bytes, not int"),
        ({}, {}, r"names no image, and the row has 0 in a column of them"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, part: dict[str, Any], cfg: dict[str, Any], sentence: str) -> None:
    file = write(tmp_path, {"messages": [asked({"type": "image", **part}), ANSWER]})
    with pytest.raises(DataError, match=rf"train.jsonl:1: messages\[0\].content\[0\].*{sentence}"):
        images_of(file, **cfg)


def test_images_that_nothing_could_come_of_are_refused(tmp_path: Path) -> None:
    image = {"type": "image", "image": "pictures/one.png"}
    file = write(tmp_path, {"messages": [asked(image), {"role": "assistant", "content": [image]}]})
    with pytest.raises(DataError, match="an assistant's turn is text, and cannot hold an image"):
        images_of(file)
    file = write(tmp_path, {"messages": [asked(image), ANSWER], "images": ["pictures/one.png"]})
    with pytest.raises(DataError, match="images holds 1 images, and the messages have 0 parts of type image for them"):
        images_of(file)
    with pytest.raises(DataError, match="is an image, and the student reads text alone"):
        list(open_dataset(ChatFile(path=file))())


def test_a_file_that_changes_after_it_was_read_is_not_used(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": [asked({"type": "image", "image": "pictures/one.png"}), ANSWER]})
    [chat] = open_dataset(ChatFile(path=file), images=ImagesConfig())()
    [image] = chat.messages[0].images
    assert encoded(image) == PICTURE
    (tmp_path / "pictures" / "one.png").write_bytes(png(40, 24, seed=2))
    with pytest.raises(InvalidRequest, match="has changed since the dataset was read"):
        decoded(image)


def test_a_photograph_is_turned_as_it_says(tmp_path: Path) -> None:
    picture, exif = PIL.Image.open(io.BytesIO(PICTURE)), PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right
    write(tmp_path)
    picture.save(tmp_path / "photo.jpg", exif=exif)
    file = write(tmp_path, {"messages": [asked({"type": "image", "image": "photo.jpg"}), ANSWER]})
    [chat] = open_dataset(ChatFile(path=file), images=ImagesConfig())()
    [image] = chat.messages[0].images
    assert (image.width, image.height) == (24, 40) == decoded(image).size


@pytest.mark.parametrize(
    ("name", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_an_image_that_is_cut_short_is_refused_with_its_row_and_its_file(
    tmp_path: Path, name: str, options: dict[str, Any], kept: float
) -> None:
    picture, exif = PIL.Image.open(io.BytesIO(png(200, 160, seed=3))), io.BytesIO()
    picture.resize((40, 32)).save(exif, "JPEG")  # a preview, which is whole
    stream = io.BytesIO()
    comment = {"comment": exif.getvalue()} if name == "JPEG" else {}
    picture.save(stream, name, **options, **comment)
    whole = stream.getvalue()
    file = write(tmp_path, {"messages": [asked({"type": "image", "image": "cut"}), ANSWER]})
    (tmp_path / "cut").write_bytes(whole + bytes(40))  # what follows an image is nobody's concern
    images_of(file)
    (tmp_path / "cut").write_bytes(whole[: int(kept * len(whole))])
    said = "cut short" if name != "WEBP" else "could not create decoder object"
    with pytest.raises(DataError, match=rf"train.jsonl:1: messages\[0\].content\[0\]: .*/cut: \d+ bytes are .*{said}"):
        images_of(file)


def test_a_photograph_with_a_second_one_behind_it_is_a_jpeg_like_others(tmp_path: Path) -> None:
    picture, exif = PIL.Image.open(io.BytesIO(PICTURE)), PIL.Image.Exif()
    exif[0x0112] = 6
    write(tmp_path)
    picture.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[picture], exif=exif)
    image = describe_image((tmp_path / "photo.jpg").read_bytes())
    assert (image.width, image.height) == (24, 40) == decoded(image).size
    assert data_url(image).startswith("data:image/jpeg;base64,")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    save_image_processor(path, max_pixels=1024)
    return path


@pytest.fixture(scope="module")
def reader(model: Path) -> ImageReader:
    config = AutoConfig.for_model("qwen2_5_vl", image_token_id=IMAGE_TOKEN, vision_start_token_id=VISION_START)
    return ImageReader(Sight(config=config, processor=Qwen2VLImageProcessorPil.from_pretrained(model), tokenizer=None))


def sequences_of(file: Path, model: Path, reader: ImageReader, **policy: Any) -> list[TokenSequence]:
    data = DataConfig.model_validate({"train": {"format": "chat", "path": str(file)}, **policy})
    encoder = ChatEncoder(load_fast_tokenizer(model), images=reader)
    return load_sequences("train", open_dataset(data.train, images=data.images), encoder, data).sequences


def test_tokens_are_those_of_the_model_s_own_processor(
    tmp_path: Path, model: Path, reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, large = {"type": "image", "image": "pictures/one.png"}, {"type": "image", "image": "large.png"}
    (tmp_path / "large.png").write_bytes(png(200, 90, seed=3))
    messages = [asked(image, {"type": "text", "text": " and "}, large), ANSWER, asked(image), ANSWER]
    [sequence] = sequences_of(write(tmp_path, {"messages": messages}), model, reader)
    # Without torchvision there is no video processor, which nothing here needs.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, argument: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil.from_pretrained(model), tokenizer, video_processor=None)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pictures = [PIL.Image.open(io.BytesIO(data)) for data in (PICTURE, png(200, 90, seed=3), PICTURE)]
    own = processor(text=[text], images=pictures)
    ids = np.array(own["input_ids"][0])
    assert ids[: sequence.num_tokens].tolist() == sequence.token_ids.tolist()
    is_image = np.array(own["mm_token_type_ids"][0]) == 1
    placed = np.concatenate([np.arange(image.first_token, image.end) for image in sequence.images])
    assert placed.tolist() == np.flatnonzero(is_image).tolist()
    assert tokenizer.decode(sequence.labels) == "It shows noise.<|im_end|>It shows noise.<|im_end|>"


def test_what_is_cut_away_takes_its_images_along(tmp_path: Path, model: Path, reader: ImageReader) -> None:
    image = {"type": "image", "image": "pictures/one.png"}
    file = write(tmp_path, {"messages": [asked(image), ANSWER, asked(image), ANSWER]})
    [whole] = sequences_of(file, model, reader)
    [cut] = sequences_of(file, model, reader, max_tokens=whole.num_tokens - 5, too_long="truncate")
    [first] = sequences_of(file, model, reader, max_tokens=whole.images[1].first_token, too_long="truncate")
    assert (len(whole.images), len(cut.images), len(first.images)) == (2, 2, 1)


def test_a_text_that_writes_an_image_token_is_refused(tmp_path: Path, model: Path, reader: ImageReader) -> None:
    file = write(tmp_path, {"messages": [{"role": "user", "content": "<|image_pad|>"}, ANSWER]})
    with pytest.raises(DataError, match="the template writes 1 image tokens for 0 images"):
        sequences_of(file, model, reader)


# As LLaVA-OneVision's: images first, and no word of a message that is not in parts.
PARTS_ALONE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
)


def test_a_template_that_looks_for_parts_alone_leaves_out_no_text(
    tmp_path: Path, tiny_vision: TinyVisionModels
) -> None:
    path = tiny_vision.path("llava_onevision")
    reader, tokenizer = reader_of(path), load_fast_tokenizer(path)
    tokenizer.chat_template = PARTS_ALONE
    image = {"type": "image", "image": "pictures/one.png"}
    messages = [{"role": "system", "content": "Be brief."}, asked(image, image), ANSWER]
    file = write(tmp_path, {"messages": messages})
    encoder = ChatEncoder(tokenizer, images=reader)
    data = DataConfig.model_validate({"train": {"format": "chat", "path": str(file)}})
    [sequence] = load_sequences("train", open_dataset(data.train, images=data.images), encoder, data).sequences
    own = tokenizer.decode(reader.tokens(40, 24))
    assert tokenizer.decode(sequence.token_ids) == (
        f"<|im_start|>system \nBe brief.<|im_end|><|im_start|>user {own}{own}\nWhat is it?<|im_end|>"
        "<|im_start|>assistant \nIt shows noise.<|im_end|>"
    )
    assert [placed.num_tokens for placed in sequence.images] == [len(reader.tokens(40, 24))] * 2
    assert sequence.images[0].end == sequence.images[1].first_token
    assert tokenizer.decode(sequence.labels).strip() == "It shows noise.<|im_end|>"


def test_a_student_whose_images_packed_attention_cannot_read_says_why(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3").save_pretrained(tmp_path / "gemma3")
    student = SimpleNamespace(student=SimpleNamespace(model=tmp_path / "gemma3"))
    assert load_image_reader(tmp_path / "gemma3") is None
    file = write(tmp_path, {"messages": [asked({"type": "image", "image": "pictures/one.png"}), ANSWER]})
    with pytest.raises(DataError, match="is an image, and a student of model type gemma3 reads text alone here: "):
        list(open_dataset(ChatFile(path=file), images=no_images(cast(TrainerConfig, student)))())
