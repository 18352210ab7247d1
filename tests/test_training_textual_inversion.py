"""Textual inversion that we train, against diffusers' recipe written with transformers' text model."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from safetensors.torch import load_file
from test_training_pictures import folder, loaded, make_lesson, runs, teach  # noqa: F401  (fixtures)

import oracle
from extensions.emphasis import encode_weighted
from extensions.textual_inversion import load_embedding
from model_loader import load_tokenizer
from training import textual_inversion


class Pipeline(TextualInversionLoaderMixin):
    """As much of one as diffusers' loader looks at."""

    components, hf_device_map = {}, None
    _execution_device = torch.device("cpu")

    def __init__(self, text_encoder):
        self.text_encoder, self.tokenizer = text_encoder, load_tokenizer()


def encode_by_transformers(pipe, prompts):
    prompts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipe.text_encoder(ids.masked_fill(ids == pipe.tokenizer.pad_token_id, 49407)).last_hidden_state


@pytest.mark.parametrize("n", [1, 3])
def test_gradients_equal_those_of_diffusers_recipe(folder, checkpoint, weights, n):  # noqa: F811
    """There, tokens are added to the tokenizer and their rows to the embedding, which then has gradients."""
    for path in folder.glob("*.txt"):
        path.write_text(f"a <toy>, {path.stem}")
    lesson = make_lesson(folder, checkpoint)
    vectors = torch.randn(n, 32, generator=torch.Generator().manual_seed(5))
    stage = textual_inversion.InversionStage(lesson, "<toy>", vectors.clone(), None)

    pipe = Pipeline(oracle.clip_oracle(weights).requires_grad_(False))
    pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    rows = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    unet = oracle.unet_oracle(weights).requires_grad_(False)
    with torch.enable_grad():
        loss = stage.loss(0, 3, torch.Generator().manual_seed(7))
        loss.backward()

        generator = torch.Generator().manual_seed(7)
        picked = torch.randint(3, (3,), generator=generator).tolist()
        torch.randint(2**30, (3,), generator=generator)  # which of several captions
        timesteps = torch.randint(0, 1000, (3,), generator=generator)
        latents = lesson.latents[picked]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).add_noise(
            latents, noise, timesteps)
        context = encode_by_transformers(pipe, [lesson.examples[row].caption for row in picked])
        expected = torch.nn.functional.mse_loss(unet(noisy, timesteps, context).sample, noise)
        expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradient = stage.modules["vectors"].weight.grad
    torch.testing.assert_close(gradient, rows.grad[-n:], atol=1e-5, rtol=1e-4)
    assert gradient.abs().max() > 1e-3


def test_nothing_but_the_vectors_is_trained(folder, checkpoint):  # noqa: F811
    lesson = make_lesson(folder, checkpoint)
    for path in folder.glob("*.txt"):
        path.unlink()
    lesson.examples = [example._replace(caption="") for example in lesson.examples]
    stage = textual_inversion.InversionStage(lesson, "toy", torch.ones(2, 32), None)
    with torch.enable_grad():
        stage.loss(0, 2, torch.Generator().manual_seed(0)).backward()
    assert [weight.shape for weight in stage.modules.parameters()] == [(2, 32)]
    assert not any(weight.requires_grad for network in lesson.models.values() for weight in network.parameters())


@pytest.mark.parametrize("token", ["my-toy", "<toy>"])
def test_the_file_is_read_by_load_embedding_and_by_diffusers_alike(teach, folder, models, weights, token):  # noqa: F811
    for path in folder.glob("*.txt"):
        path.unlink()
    path = teach(textual_inversion, "--vectors", "2", name=token)
    name, vectors = load_embedding(path)
    assert name == token and vectors.shape == (2, 32)
    tokenizer = load_tokenizer()
    start = models["clip"].token_embedding.weight[tokenizer("cat", add_special_tokens=False).input_ids]
    assert 0 < (vectors - start).abs().max() < 0.1

    pipe = Pipeline(oracle.clip_oracle(weights))
    pipe.load_textual_inversion(path)
    prompt = f"a photo of {token}, on grass"
    torch.testing.assert_close(encode_weighted(prompt, [], models["clip"], tokenizer, {name: vectors}),
                               encode_by_transformers(pipe, [prompt]), atol=1e-5, rtol=0)


def test_web_uis_find_one_tensor(teach, folder):  # noqa: F811
    """They take the first tensor of such a file, and its vectors row by row."""
    for path in folder.glob("*.txt"):
        path.write_text("a mine")
    (key, vectors), = load_file(teach(textual_inversion, name="mine")).items()
    assert key == "mine" and vectors.shape == (1, 32) and vectors.dtype == torch.float32


@pytest.mark.parametrize("caption, words", [("a dog", "does not have 'mine' in it"), ("mine " * 80, "80 tokens")])
def test_captions_that_cannot_be_used_are_named(teach, folder, caption, words):  # noqa: F811
    (folder / "dog.txt").write_text(caption)
    (folder / "cat.txt").write_text("mine")
    (folder / "owl.txt").write_text("mine")
    with pytest.raises(ValueError, match=words):
        teach(textual_inversion, name="mine")


def test_init_has_to_be_a_word(teach, folder):  # noqa: F811
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="--init is ''"):
        teach(textual_inversion, "--init", "")
