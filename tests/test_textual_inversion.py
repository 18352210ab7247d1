import base64
import json
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import oracle
from checkpoint_file import CheckpointError
from extensions import textual_inversion
from extensions.emphasis import encode_weighted
from extensions.textual_inversion import find_embeddings, load_embedding
from model_loader import load_tokenizer

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def web_ui(vectors=VECTORS, name="stored"):
    """What AUTOMATIC1111's web UI saves."""
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": name, "step": 100,
            "sd_checkpoint": None, "sd_checkpoint_name": None}


def to_json(data):
    return json.dumps(data, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode()


def write_text_picture(path, data):
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(to_json(data)).decode())
    Image.new("RGB", (16, 16), "red").save(path, pnginfo=info)


def write_strip_picture(path, data, height=64, cut=None):
    """The bytes' low halves in the low bits of a strip on the left, the high halves on the right, a generator's numbers
    over both, repeated to fill the strips; a black column beside each strip."""
    content = np.frombuffer(zlib.compress(to_json(data), 9)[:cut], np.uint8)
    width = -(-len(content) // (3 * height)) + 1
    strips = []
    for nibbles in (content & 0x0F, content >> 4):
        strip = np.resize(nibbles, (height, width, 3)).astype(np.uint8)
        state, numbers = 0, []
        for _ in range(strip.size):
            state = (1664525 * state + 1013904223) % 2**32
            numbers.append(state % 255 & 0x0F)
        strips.append(strip ^ np.array(numbers, np.uint8).reshape(strip.shape) | 0x50)
    black, picture = np.zeros((height, 1, 3), np.uint8), np.full((height, 40, 3), 0xE7, np.uint8)
    pixels = np.concatenate([strips[0], black, picture, black, strips[1]], axis=1)
    Image.fromarray(np.pad(pixels, ((2, 5), (3, 1), (0, 0)))).save(path)


def parameter_dict(vectors):
    """What web UIs of 2022 saved."""
    parameters = torch.nn.ParameterDict()
    parameters["*"] = torch.nn.Parameter(vectors)
    return parameters


@pytest.mark.parametrize("file, write, expected", [
    ("a.pt", lambda path: torch.save(web_ui(), path), "a"),
    ("a.pt", lambda path: torch.save(web_ui(torch.nn.Parameter(VECTORS)), path), "a"),
    ("a.pt", lambda path: torch.save(web_ui(), path, _use_new_zipfile_serialization=False), "a"),
    ("a.pt", lambda path: torch.save({**web_ui(), "string_to_param": parameter_dict(VECTORS)}, path), "a"),
    ("learned_embeds.bin", lambda path: torch.save({"<toy>": VECTORS}, path), "<toy>"),
    ("learned_embeds.safetensors", lambda path: save_file({"<toy>": VECTORS}, path), "<toy>"),
    ("kohya.safetensors", lambda path: save_file({"emb_params": VECTORS}, path, {"ss_v2": "False"}), "kohya"),
    ("a.png", lambda path: write_text_picture(path, web_ui()), "stored"),
    ("a.png", lambda path: write_text_picture(path, web_ui(name=None)), "a"),
    ("a.png", lambda path: write_strip_picture(path, web_ui()), "stored"),
    ("a.webp", lambda path: write_text_picture(path, web_ui()), None),
])
def test_each_kind_of_file(tmp_path, file, write, expected):
    path = tmp_path / file
    if expected is None:  # a WebP has no room for text
        write_strip_picture(tmp_path / "a.png", web_ui())
        Image.open(tmp_path / "a.png").save(path, lossless=True)
        expected = "stored"
    else:
        write(path)
    name, vectors = load_embedding(path)
    assert name == expected
    assert vectors.dtype == torch.float32 and torch.equal(vectors, VECTORS)


def test_one_vector_in_half_precision(tmp_path):
    save_file({"<toy>": VECTORS[0].half()}, tmp_path / "a.safetensors")
    _, vectors = load_embedding(tmp_path / "a.safetensors")
    assert vectors.dtype == torch.float32 and torch.equal(vectors, VECTORS[:1].half().float())


@pytest.mark.parametrize("tensors, expected", [
    ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, "SDXL"),
    ({"clip_g": torch.zeros(2, 1280)}, "SDXL"),
    ({"<toy>": torch.zeros(1, 1024)}, "SD 2"),
    ({"<toy>": torch.zeros(1024)}, "SD 2"),
    ({"<toy>": torch.zeros(1, 1280)}, "SDXL"),
    ({"a": VECTORS, "b": VECTORS[:1].clone()}, "2 entries ('a', 'b')"),
    ({}, "0 entries"),
    ({"<toy>": torch.zeros(1, 2, 768)}, "(1, 2, 768)"),
    ({"<toy>": torch.zeros(0, 768)}, "(0, 768)"),
    ({"<toy>": torch.zeros(1, 768, dtype=torch.int64)}, "int64"),
    ({"<toy>": torch.full((1, 768), torch.nan)}, "NaN"),
])
def test_what_is_no_embedding_of_sd_1_is_refused_by_name(tmp_path, tensors, expected):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load_embedding(path)
    assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


class Attack:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile(path):
    attack = Attack()
    attack.path = path.with_name("executed")
    path.write_bytes(pickle.dumps(web_ui(attack), protocol=2))


def truncated(path):
    torch.save(web_ui(), path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("file, write", [
    ("a.pt", hostile),
    ("a.pt", truncated),
    ("a.pt", lambda path: torch.save({"string_to_param": {}}, path)),
    ("a.pt", lambda path: torch.save({"string_to_param": {"*": VECTORS, "+": VECTORS}}, path)),
    ("a.pt", lambda path: torch.save({"string_to_param": VECTORS}, path)),
    ("a.pt", lambda path: torch.save({"string_to_param": {"*": "text"}}, path)),
    ("a.pt", lambda path: torch.save(VECTORS, path)),
    ("a.bin", lambda path: path.write_bytes(b"")),
    ("a.safetensors", lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{")),
    ("a.png", lambda path: path.write_bytes(b"\x89PNG")),
    ("a.png", lambda path: Image.new("RGB", (64, 64), "red").save(path)),
    ("a.png", lambda path: Image.new("RGB", (64, 64)).save(path)),
    ("a.png", lambda path: write_text_picture(path, ["no dict"])),
    ("a.png", lambda path: write_text_picture(path, {"string_to_param": {"*": "text"}})),
    ("a.png", lambda path: write_text_picture(path, {"string_to_param": {"*": {"TORCHTENSOR": [[1], [2, 3]]}}})),
    ("a.png", lambda path: write_text_picture(path, {"string_to_param": 5})),
    ("a.png", lambda path: write_strip_picture(path, web_ui(), cut=-40)),
])
def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path, file, write):
    path = tmp_path / file
    write(path)
    with pytest.raises(CheckpointError) as error:
        load_embedding(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_picture_is_not_unpacked_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(textual_inversion, "MOST_BYTES", 2**16)
    write_strip_picture(tmp_path / "a.png", web_ui())
    load_embedding(tmp_path / "a.png")
    write_strip_picture(tmp_path / "a.png", {**web_ui(), "more": "a" * 2**17})
    with pytest.raises(CheckpointError, match="too long or cut off"):
        load_embedding(tmp_path / "a.png")


@pytest.mark.parametrize("file", ["a.pt", "a.png"])
def test_a_missing_file(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=file):
        load_embedding(tmp_path / file)


def test_a_folder_is_searched(tmp_path):
    (tmp_path / "more").mkdir()
    torch.save(web_ui(), tmp_path / "one.pt")
    torch.save({"<toy>": VECTORS[:2]}, tmp_path / "more" / "two.bin")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "three.preview.png")
    (tmp_path / "notes.txt").write_text("no embedding")
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, tmp_path / "xl.safetensors")
    with pytest.warns(UserWarning, match="xl.safetensors.*SDXL") as warnings:
        found = find_embeddings(tmp_path)
    assert len(warnings) == 1
    assert {name: len(vectors) for name, vectors in found.items()} == {"one": 3, "two": 2, "<toy>": 2}
    assert find_embeddings(tmp_path / "nowhere") == {}

    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(data)  # a circle is walked once
    assert list(find_embeddings(data)) == ["two", "<toy>"]


def encode_by_transformers(weights, tokenizer, prompt, name, vectors):
    """As diffusers does: a token is added for each vector, its row put into a larger token embedding, and the name in
    the prompt replaced by the tokens."""
    names = [name] + [f"{name}_{i}" for i in range(1, len(vectors))]
    tokenizer.add_tokens(names)
    model = oracle.clip_oracle(weights)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for token, vector in zip(names, vectors):
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = vector
    prompt = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    tokens = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return model(tokens.masked_fill(tokens == tokenizer.pad_token_id, 49407)).last_hidden_state


@pytest.mark.parametrize("name, prompt, vectors", [("<cat-toy>", "a photo of <cat-toy>, on grass", VECTORS),
                                                   ("<toy>", "<toy>", VECTORS[0]),
                                                   ("easyneg", "a photo of easyneg on easyneg", VECTORS[:1])])
def test_equals_a_text_encoder_with_more_tokens(models, weights, tokenizer, name, prompt, vectors):
    context = encode_weighted(prompt, [], models["clip"], tokenizer, {name: vectors})
    expected = encode_by_transformers(weights, load_tokenizer(), prompt, name, torch.atleast_2d(vectors))
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=0)
    plain = encode_weighted(prompt, [], models["clip"], tokenizer)
    assert (context - plain).abs().max() > 0.1


def test_neither_tokenizer_nor_text_encoder_change(models, tokenizer):
    before = {name: weight.clone() for name, weight in models["clip"].state_dict().items()}
    seen = []
    hook = models["clip"].token_embedding.register_forward_hook(lambda *args: seen.append((args[2], args[2].clone())))
    encode_weighted("a toy", [], models["clip"], tokenizer, {"toy": VECTORS})
    hook.remove()
    assert len(tokenizer) == 49408
    assert all(torch.equal(weight, before[name]) for name, weight in models["clip"].state_dict().items())
    assert seen and all(torch.equal(output, copy) for output, copy in seen)
