import copy
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
from compel import Compel
from compel.embeddings_provider import SplitLongTextMode
from torch import nn

from extensions.emphasis import at_step, encode_weighted, parse
from model_loader import load_tokenizer
from pipeline import encode_prompts, generate, get_time_embedding

CASES = json.loads((Path(__file__).parent / "fixtures" / "emphasis.json").read_text())
EMBEDDING = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def clip_oracle(weights):
    return oracle.clip_oracle(weights)


@pytest.fixture
def encode(models, tokenizer):
    """encode_weighted() with the tiny text encoder, without negative prompts unless they are given."""
    def encode(prompts, uncond_prompts=(), **settings):
        return encode_weighted(prompts, uncond_prompts, models["clip"], tokenizer, **settings)
    return encode


class Recorder(nn.Module):
    """A text encoder that notes the tokens that it is given, and returns the vectors that it was given."""

    def __init__(self, n_tokens=77, z=None):
        super().__init__()
        self.config = SimpleNamespace(n_vocab=49408, n_tokens=n_tokens, d_embed=4, n_layers=2)
        self.chunks, self.z = [], z

    def forward(self, tokens):
        self.chunks += tokens.tolist()
        return torch.ones(*tokens.shape, 4) if self.z is None else self.z


# ---- the grammar: expectations are what AUTOMATIC1111's web UI 1.10.1 returned


@pytest.mark.parametrize("prompt, expected", CASES["emphasis"])
def test_texts_and_weights(prompt, expected):
    assert parse(prompt) == expected


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:..)"])
def test_a_weight_that_is_no_number(prompt, encode):
    with pytest.raises(ValueError, match="no weight"):
        parse(prompt)
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        encode("a cat", prompt)


@pytest.mark.parametrize("prompt, n_steps, expected", CASES["schedules"])
def test_prompt_editing(prompt, n_steps, expected):
    for step in range(n_steps):
        assert at_step(prompt, step, n_steps) == next(text for end, text in expected if step < end)


@pytest.mark.parametrize("prompt, expected", [
    ("[" * 5000 + "a" + "]" * 5000, "[" * 5000 + "a" + "]" * 5000),
    ("[" * 5000 + "a:b:1]", "[" * 4999 + "b"),
    ("[" * 5000 + "a" + ":b:1]" * 5000, "b"),
    ("[a:b:-1e999]", "b"),
    ("[a:b:1e999]", "a"),
    ("[a:b:[1|1]]", "[a:b:1]"),
    ("a\\\nb [c:d:1]", "a\\\nb [c:d:1]"),
    ("a | b [c:d:1]", "a | b [c:d:1]"),
    ("(a:b:1.2) [c:d:1]", "(a:b:1.2) d"),
    ("[(a:b:1.2):c:1]", "[(a:b:1.2):c:1]"),
], ids=range(10))
def test_deep_broken_and_odd_brackets(prompt, expected):
    assert at_step(prompt, 5, 10) == expected


def test_random_texts_neither_fail_nor_change_without_editing():
    draw = random.Random(0)
    for _ in range(2000):
        prompt = "".join(draw.choices(["a", " b", "(", ")", "[", "]", ":", "1.5", "\\", "BREAK ", "é"], k=12))
        pieces = parse(prompt) if not re.search(r":\s*[+-]?[.\d]*\.[.\d]*\.|:\.+\)", prompt) else [["", 1.0]]
        assert all(isinstance(text, str) and abs(weight) < 1e9 for text, weight in pieces)
        assert at_step(prompt, 3, 10) == at_step(at_step(prompt, 3, 10), 3, 10)


# ---- chunks


def shorten(text):
    """Replaces w0, w1, … in a case by letters, which are one token each."""
    return re.sub(r"\b[wv](\d+)\b", lambda match: "abcdefghijklmnopqrstuvwxyz"[int(match[1]) % 26], text)


@pytest.mark.parametrize("case", CASES["chunks"], ids=lambda case: case["case"])
def test_chunks(case, tokenizer):
    recorder = Recorder()
    encode_weighted(shorten(case["prompt"]), [], recorder, tokenizer)
    expected = [tokenizer(shorten(" ".join(chunk))).input_ids[1:-1] for chunk in case["chunks"]]
    assert recorder.chunks == [[49406, *chunk, *[49407] * (76 - len(chunk))] for chunk in expected]


@pytest.mark.parametrize("n_words, expected", [(70, [70, 9]), (67, [75, 1])])
def test_the_vectors_of_an_embedding_stay_in_one_chunk(encode, n_words, expected):
    context = encode("dog " * n_words + "emb x", embeddings={"emb": EMBEDDING}, mask_padding=True)
    assert context.shape[1] == sum(expected) + 2 * len(expected)


def test_an_embedding_after_a_comma_moves_with_its_vectors(encode):
    words = "dog " * 64 + ", "
    context = encode(words + "emb cat cat dog", embeddings={"emb": EMBEDDING})
    expected = encode(words + "BREAK emb cat cat dog", embeddings={"emb": EMBEDDING})
    assert context.shape[1] == 2 * 77
    assert torch.equal(context, expected)


def test_weights_move_with_their_words(encode):
    words = "dog " * 69 + ", "
    context = encode(words + "(cat cat cat cat cat cat:1.3)")
    assert torch.equal(context, encode(words + "BREAK (cat cat cat cat cat cat:1.3)"))
    assert not torch.equal(context, encode(words + "cat cat cat cat cat cat"))


@pytest.mark.parametrize("n_words", [3, 75, 76, 200])
def test_long_prompts_equal_compel(clip_oracle, encode, tokenizer, n_words):
    draw = random.Random(n_words)
    prompt = " ".join(draw.choices(["red", "apple", "on", "a", "wooden", "table", "."], k=n_words))
    compel = Compel(tokenizer, clip_oracle, truncate_long_prompts=False,
                    split_long_text_mode=SplitLongTextMode.BRUTAL)
    torch.testing.assert_close(encode(prompt), compel(prompt), atol=1e-5, rtol=0)


def test_shorter_prompts_get_empty_chunks(encode):
    long = "a red apple " * 30
    context = encode(["a cat", long], ["", "blurry"])
    assert context.shape == (4, 2 * 77, 32)
    empty = encode("")
    for row, prompt in enumerate(["a cat", None, "", "blurry"]):
        if prompt is not None:
            torch.testing.assert_close(context[row, None], torch.cat([encode(prompt), empty], dim=1))
    torch.testing.assert_close(context[1, None], encode(long))


# ---- weights


def test_weights_equal_the_numeric_case(tokenizer):
    case = CASES["weights"]
    recorder = Recorder(6, torch.tensor(case["z"]))
    context = encode_weighted("(a b:1.2)(c:0.5) d", [], recorder, tokenizer)
    assert recorder.chunks == [tokenizer("a b c d").input_ids]
    torch.testing.assert_close(context, torch.tensor(case["expected"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prompt", ["a red fox, (blue) hat", "((a)) [b]" * 40, "(a:0)", "(a:-0.5) b"])
def test_the_mean_of_each_chunk_stays(encode, prompt):
    plain = " ".join(text for text, _ in parse(prompt))
    for weighted, before in zip(encode(prompt).split(77, dim=1), encode(plain).split(77, dim=1), strict=True):
        assert weighted.mean().item() == pytest.approx(before.mean().item(), abs=1e-6)
        assert not torch.equal(weighted, before)


def test_weights_of_one_change_no_bit(models, tokenizer, encode):
    expected = encode_prompts(["a red fox"], ["a cat"], models["clip"], tokenizer)
    assert torch.equal(encode("a (red:1) fox", "a cat"), expected)


def test_a_prompt_in_a_batch_is_as_it_is_alone(encode):
    context = encode(["a (red:1.5) fox", "a (blue:0.2) cat"], ["(bad:2)", ""])
    for row, prompt in enumerate(["a (red:1.5) fox", "a (blue:0.2) cat", "(bad:2)", ""]):
        torch.testing.assert_close(context[row, None], encode(prompt), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(models, tokenizer, encode, dtype):
    clip = copy.deepcopy(models["clip"]).to(dtype)
    context = encode_weighted("a (red:1.3) fox", [], clip, tokenizer, {"fox": EMBEDDING})
    assert context.dtype == dtype
    expected = encode("a (red:1.3) fox", embeddings={"fox": EMBEDDING})
    torch.testing.assert_close(context.float(), expected, atol=0.1, rtol=0.1)


# ---- clip skip


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_equals_transformers(clip_oracle, tokenizer, encode, clip_skip):
    tokens = tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = clip_oracle(tokens, output_hidden_states=True).hidden_states[-clip_skip]
    expected = getattr(clip_oracle, "text_model", clip_oracle).final_layer_norm(hidden)
    torch.testing.assert_close(encode("a red fox", clip_skip=clip_skip), expected, atol=1e-5, rtol=0)


# ---- prompt editing


def test_editing_gives_the_context_of_each_step(encode):
    context = encode(["a [cat:dog:0.5]", "a fox"], ["[x|(y:1.3)]", "[z::1]"])
    for n_steps in (4, 10):
        for step in range(n_steps):
            prompts = ["a cat" if step < n_steps // 2 else "a dog", "a fox"]
            uncond_prompts = ["(y:1.3)" if step % 2 else "x", "" if step >= 1 else "z"]
            torch.testing.assert_close(context(step, n_steps), encode(prompts, uncond_prompts))


def test_editing_alone_makes_a_function(encode):
    for prompt in ["a cat", "[cat]", "a:b", "(a:1.2)", "a|b", "[a:b", "\\[a|b\\]"]:
        assert isinstance(encode(prompt), torch.Tensor), prompt
    for prompts in [("[a|b]", ""), ("a", "[b:0.5]")]:
        assert callable(encode(*prompts)), prompts


def test_each_text_is_encoded_once(models, tokenizer):
    calls = []
    hook = models["clip"].register_forward_hook(lambda *args: calls.append(args))
    context = encode_weighted("a [cat|dog]", "", models["clip"], tokenizer)
    for step in range(10):
        context(step, 10)
    hook.remove()
    assert len(calls) == 2


def test_pictures_are_drawn(models, tokenizer, encode):
    settings = {"models": models, "n_inference_steps": 2, "seed": 3, "height": 64, "width": 64, "sampler_name": "ddim",
                "progress": False}
    image = generate(context=encode("a [cat:dog:0.5]", "blurry"), **settings)
    late, early = (generate(context=encode(prompt, "blurry"), **settings) for prompt in ("a cat", "a dog"))
    assert image.shape == (64, 64, 3) and (image != late).any() and (image != early).any()
    never = generate(context=encode("a [cat:dog:1.0]", "blurry"), **settings)
    assert (never == late).all()
    plain = generate("a cat", "blurry", tokenizer=tokenizer, **settings)
    assert (plain == late).all()


# ---- no padding


@pytest.mark.parametrize("prompts", [["a cat"], ["a red cat", ""], ["a red cat", "a dog on a table", "x"],
                                     ["a (red:1.4) cat " * 30, "a dog"]], ids=len)
def test_without_padding_equals_a_mask_of_diffusers(models, weights, tokenizer, encode, prompts):
    """The mask is the tokenizer's own: start token, words, first end token."""
    context = encode(prompts, mask_padding=True)
    padded = encode(prompts)
    n_chunks = padded.shape[1] // 77
    mask = torch.zeros(len(prompts), n_chunks, 77)
    for row, prompt in zip(mask, prompts):
        n_tokens = len(tokenizer(re.sub(r"\(|:1.4\)", "", prompt)).input_ids) - 2
        for k in range(n_chunks):
            n = min(75, n_tokens - 75 * k)
            if n > 0 or k == 0:
                row[k, : n + 2] = 1
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = oracle.unet_oracle(weights)
    expected = unet(latents, 500, padded, encoder_attention_mask=mask.flatten(1)).sample
    output = models["diffusion"](latents, context, get_time_embedding(500, models["diffusion"].config.channels[0]))
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    with_padding = unet(latents, 500, padded).sample
    assert (expected - with_padding).abs().max() > 1e-2


def test_without_padding_takes_no_more_tokens_than_needed(encode):
    assert encode("a red fox", mask_padding=True).shape[1] == 5
    assert encode("a red fox", "a blue cat", mask_padding=True).shape[1] == 5
    assert encode("a red fox", "", mask_padding=True).shape[1] == 10
    context = encode("a [red fox|cat]", mask_padding=True)
    assert [context(step, 4).shape[1] for step in range(3)] == [5, 4, 5]
    with pytest.raises(ValueError, match="16, 17, 19, 23 tokens.*118864"):
        encode(["a " * n for n in (14, 15, 17, 21)], mask_padding=True)


# ---- names of embeddings


@pytest.mark.parametrize("prompt, expected", [
    ("an emb", "an {}"), ("an EMB, red", "an {}, red"), ("an embassy", "an embassy"), ("(emb:1.2) x", "({}:1.2) x"),
    ("an em(b)", "an em(b)"), ("my big emb", "my {}"), ("emb emb", "{} {}"), ("a <emb>.", "a {}."), ("x<EMB>y", "x{}y"),
])
def test_names_are_found_in_prompts(models, tokenizer, encode, prompt, expected):
    """The vectors of the embedding are those of words, so that these can be written in its place."""
    words = torch.tensor(tokenizer("red fox jumps").input_ids[1:-1])
    embeddings = dict.fromkeys(["emb", "big emb", "<emb>"], models["clip"].token_embedding(words))
    context = encode(prompt, embeddings=embeddings)
    torch.testing.assert_close(context, encode(expected.replace("{}", " red fox jumps ")))


# ---- what is refused


@pytest.mark.parametrize("settings, expected", [
    ({"prompts": "a cat AND a dog"}, "AND"),
    ({"prompts": ["a", "b"], "uncond_prompts": ["c"]}, "2 prompts and 1 uncond_prompts"),
    ({"prompts": []}, "0 prompts"),
    ({"prompts": [None]}, "None"),
    ({"prompts": "a", "clip_skip": 0}, "1 to 2"),
    ({"prompts": "a", "clip_skip": 3}, "1 to 2"),
    ({"prompts": "an emb", "embeddings": {"emb": torch.zeros(2, 768)}}, r"'emb'.*\(2, 768\).*\(n, 32\)"),
    ({"prompts": "an emb", "embeddings": {"emb": torch.zeros(76, 32)}}, r"\(76, 32\).*1 to 75"),
    ({"prompts": "an emb", "embeddings": {"emb": torch.zeros(1, 1, 32)}}, r"\(1, 1, 32\)"),
    ({"prompts": "a", "embeddings": {" ": torch.zeros(1, 32)}}, "' '.*not empty"),
    ({"prompts": "a", "embeddings": {"": torch.zeros(1, 32)}}, "''.*not empty"),
    ({"prompts": "[a:(b:1.2.3):0.5]"}, "no weight"),
])
def test_bad_arguments(encode, settings, expected):
    with pytest.raises(ValueError, match=expected):
        encode(**settings)


def test_an_embedding_that_no_prompt_names_may_be_of_another_model(encode):
    assert torch.equal(encode("a cat", embeddings={"emb": torch.zeros(2, 768)}), encode("a cat"))


def test_what_is_only_called_like_the_text_encoder(tokenizer):
    assert encode_weighted("a (red:1.2) cat", [], Recorder(), tokenizer).shape == (1, 77, 4)
    with pytest.raises(ValueError, match="Recorder"):
        encode_weighted("a cat", [], Recorder(), tokenizer, clip_skip=2)


def test_and_is_a_word_in_a_negative_prompt_and_in_small_letters(encode):
    assert torch.equal(encode("a and b", "a AND b"), encode("a and b", "a and b"))


def test_tags_of_loras_are_not_ignored_without_a_word(encode):
    with pytest.warns(UserWarning, match="<lora:x:0.8>"):
        encode("a cat <lora:x:0.8>")
