"""Finds vectors for a word that a text encoder does not know, and changes nothing else (arXiv 2208.01618).

    python -m training.textual_inversion pictures/ --token my-mug --init mug
    python cli.py "my-mug on a table"

Writes data/embeddings/NAME.safetensors, and meanwhile, to training/runs/embedding-NAME/, a log (CSV), sheets of
pictures, and what the run needs to go on: stop it with Ctrl-C and repeat the command. README.md has more.
"""

import torch
from torch import Tensor, nn

from extensions.emphasis import encode_chunks, encode_weighted, make_splitter
from training import loop, pictures, teaching

# What is said of pictures that have no captions: the thing is what is the same in all of them.
TEMPLATES = ["{}", "a {}", "the {}", "one {}", "a picture of {}", "a picture of a {}", "an image of the {}",
             "a drawing of a {}", "this is a {}", "here is the {}"]


def encode(captions: list[str], token: str, vectors: Tensor, clip: nn.Module, tokenizer) -> Tensor:
    """Returns the context of captions that have vectors in the place of a token, (captions, 77, d), with gradients.

    Raises:
        ValueError: a caption is without the token, or longer than the text encoder takes.
    """
    split = make_splitter(tokenizer, {token: vectors}, clip.config)
    chunks = []
    for caption in captions:
        words = [(number, vector, 1.0) for word in split(caption) for number, vector in word]
        if all(vector is None for _, vector, _ in words):
            raise ValueError(f"the caption {caption!r} does not have {token!r} in it, which is to be learnt")
        if len(words) > clip.config.n_tokens - 2:
            raise ValueError(f"the caption {caption!r:.60} takes {len(words)} tokens; give at most "
                             f"{clip.config.n_tokens - 2}")
        chunks.append(words)
    return encode_chunks(chunks, clip, tokenizer, clip_skip=1)


def first_vectors(words: str, n: int, clip: nn.Module, tokenizer) -> Tensor:
    """Returns what the text encoder has for some words, over and over until there are n vectors: (n, d)"""
    numbers = tokenizer(words, add_special_tokens=False).input_ids
    if not numbers:
        raise ValueError(f"--init is {words!r}; give a word for what it is like")
    return clip.token_embedding.weight[[numbers[k % len(numbers)] for k in range(n)]].detach().float().clone()


class InversionStage:
    """The vectors of one token, for `loop.train`."""

    def __init__(self, lesson: teaching.Lesson, token: str, vectors: Tensor, prompts: list[str] | None):
        self.lesson, self.token = lesson, token
        self.modules = nn.ModuleDict({"vectors": nn.Embedding.from_pretrained(vectors, freeze=False)})
        self.modules.to(lesson.device)
        self.prompts = prompts or [template.format(token) for template in TEMPLATES[: teaching.SAMPLES]]
        self.captions = [[example.caption] if example.caption else [template.format(token) for template in TEMPLATES]
                         for example in lesson.examples]
        for caption in {caption for captions in self.captions for caption in captions}:
            self.encode([caption])  # says now what cannot be used

    def encode(self, captions):
        lesson = self.lesson
        return encode(captions, self.token, self.modules["vectors"].weight, lesson.clip, lesson.tokenizer)

    def loss(self, step, batch, generator):
        rows = self.lesson.pick(batch, generator)
        choices = torch.randint(2**30, (batch,), generator=generator).tolist()
        captions = [self.captions[row][choice % len(self.captions[row])] for row, choice in zip(rows, choices)]
        return self.lesson.noise_loss(self.lesson.unet, self.lesson.latents[rows], self.encode(captions), generator)

    def report(self):
        context = encode_weighted(self.prompts, "", self.lesson.clip, self.lesson.tokenizer,
                                  {self.token: self.modules["vectors"].weight})
        images = self.lesson.draw(context=context)
        return "; ".join(self.prompts), loop.sheet(images, len(images))


def main(argv=None):
    parser = teaching.make_parser(__doc__.splitlines()[0], "embeddings", steps=500, learning_rate=5e-3, name="--token")
    add = parser.add_argument
    add("--init", required=True, metavar="WORD", help="a word that the model knows, for something like it")
    add("--vectors", type=int, default=1, help="how many stand for the token (%(default)s)")
    arguments = parser.parse_args(argv)
    teaching.check(arguments)
    if len(arguments.name.split()) != 1:
        raise ValueError(f"--token is {arguments.name!r}; give one word")
    examples = pictures.read_folder(arguments.folder, needs_captions=False)
    result, run = teaching.begin("embedding", arguments, arguments.name.strip("<>"))

    lesson = teaching.Lesson(arguments, examples)
    vectors = first_vectors(arguments.init, arguments.vectors, lesson.clip, lesson.tokenizer)
    stage = InversionStage(lesson, arguments.name, vectors, arguments.sample_prompt)
    modules = loop.train("embedding", stage, lesson.settings(arguments), run)
    teaching.write(result, {arguments.name: modules["vectors"].weight}, {
        "name": arguments.name, "init": arguments.init, "steps": arguments.steps, "model": lesson.path.name})


if __name__ == "__main__":
    teaching.run(main)
