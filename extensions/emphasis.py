"""Prompts as the web UIs read them: emphasis, any length, clip skip, editing, embeddings, no padding.

    context = encode_weighted("a (red:1.3) [apple:pear:0.5]", "blurry", models["clip"], tokenizer)
    image = generate(context=context, models=models)

`(words)` weighs words by 1.1, `(words:1.3)` by 1.3, `[words]` by 1 / 1.1; `\\(` and `\\[` are brackets of the text, and
`BREAK` begins another chunk of 75 tokens. `[apple:pear:0.5]` changes after half of the steps, `[apple:pear:8]` after
eight, `[apple|pear]` with every step. The grammar is that of AUTOMATIC1111's web UI, v1.10.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

import model_loader
from pipeline import device_of

COMMA_BACKTRACK = 20  # a comma at most so many tokens before the end of a chunk ends it instead

PARTS = re.compile(r"\\[][()\\]|\\|[][()]|:\s*([+-]?[.\d]+)\s*\)|[^][()\\:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse(prompt: str) -> list[list]:
    """Splits a prompt into texts and their weights.

    Brackets that nest multiply, those left open reach to the end, and those never opened are text.

    Args:
        prompt: a text without `[a:b:0.5]` and `[a|b]`, which `at_step` resolves.

    Returns:
        [[text, weight], ...], at least one, neighbours of different weights; ["BREAK", -1] where a chunk is to end.

    Raises:
        ValueError: a weight is not a number.
    """
    pieces = []  # [text, weight]
    opened = {"(": [], "[": []}  # how many pieces there were before each bracket that is open

    def close(bracket, weight):
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= weight

    for match in PARTS.finditer(prompt):
        part, weight = match.group(0), match.group(1)
        if part[0] == "\\":
            pieces.append([part[1:], 1.0])
        elif part in opened:
            opened[part].append(len(pieces))
        elif weight and opened["("]:
            close("(", to_weight(weight, prompt))
        elif part == ")" and opened["("]:
            close("(", 1.1)
        elif part == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            first, *others = BREAK.split(part)
            pieces.append([first, 1.0])
            for text in others:
                pieces += [["BREAK", -1], [text, 1.0]]
    while opened["("]:
        close("(", 1.1)
    while opened["["]:
        close("[", 1 / 1.1)

    merged = pieces[:1] or [["", 1.0]]
    for text, weight in pieces[1:]:
        if weight == merged[-1][1]:
            merged[-1][0] += text
        else:
            merged.append([text, weight])
    return merged


def to_weight(text, prompt):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no weight, in the prompt {prompt!r:.80}; give a number, as (red:1.2)") from None


# A bracket with a number before its end is one part: whether it is prompt editing shows there.
EDITS = re.compile(r"\\.|:\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*\]|[^][()\\:|]+|[][()\\:|]")


def at_step(prompt: str, step: int, n_steps: int) -> str:
    """Resolves prompt editing.

    `[a:b:when]` is a, then b; `[b:when]` is nothing, then b; `[a::when]` is a, then nothing. A `when` with a point is a
    share of the steps, and one without it how many steps a lasts. `[a|b|c]` is one after the other, a step each. A
    bracket that is none of these stays as it is, and a prompt with a `|` anywhere else does as a whole.

    Args:
        prompt: the text.
        step: the step, from 0; a call of the UNet is a step.
        n_steps: how many steps there are.

    Returns:
        The prompt as it reads in this step; the same text if there is nothing to edit.
    """
    # What is open, the prompt itself first: a bracket, then texts with | or : between them.
    groups = [["", ""]]
    for match in EDITS.finditer(prompt):
        part, when = match.group(0), match.group(1)
        bracket, _, *rest = group = groups[-1]
        separators = rest[::2]
        if part in ("(", "["):
            groups.append([part, ""])
        elif when and bracket == "[" and separators in ([], [":"]):
            *before, after = groups.pop()[1::2]
            end = float(when) * n_steps if "." in when else float(when)
            groups[-1][-1] += "".join(before) if step < int(max(0, min(end, n_steps))) else after
        elif part == "]" and bracket == "[" and ":" not in separators:
            texts = groups.pop()[1::2]
            groups[-1][-1] += texts[step % len(texts)] if separators else f"[{texts[0]}]"
        elif part == ")" and bracket == "(":
            groups.pop()
            groups[-1][-1] += "".join(group) + ")"
        elif part == "|" and bracket == "[" and ":" not in separators or part == ":" and bracket and not separators:
            group += [part, ""]
        elif part in ("|", "\\"):
            return prompt
        elif part[0] in ":)]":  # fits no bracket: all that are open are text
            if any("|" in group[2::2] for group in groups):
                return prompt
            groups = [["", "".join(map("".join, groups)) + part]]
        else:
            group[-1] += part
    return prompt if any("|" in group[2::2] for group in groups) else "".join(map("".join, groups))


def encode_weighted(prompts: str | list[str], uncond_prompts: str | list[str], clip: nn.Module, tokenizer,
                    embeddings: Mapping[str, Tensor] = {}, clip_skip: int = 1, mask_padding: bool = False,
                    ) -> Tensor | Callable[[int, int], Tensor]:
    """Returns the context of some prompts, followed by that of what guidance is to stay away from.

    A prompt is encoded in chunks of 75 tokens, and all get as many chunks as the longest. A weight multiplies the
    vectors of its tokens, whereupon the chunk's are scaled to have the mean that they had before.

    Args:
        prompts: one a picture.
        uncond_prompts: one for all, or as many, or none ([]) to draw without guidance.
        clip: the text encoder.
        tokenizer: what `model_loader.load_tokenizer` returns.
        embeddings: names, and the vectors (n, 768) to put in their place wherever a prompt has them, in whatever case;
            `textual_inversion.load_embedding` returns both.
        clip_skip: which layer to encode with, from the last, 1, to the first.
        mask_padding: have the pictures attend to the words, and each chunk's start and first end token, alone. A model
            that was not trained so, as SD 1.x, draws other and often worse pictures: it has learned to look at the
            padding, whose vectors know the whole prompt. Where prompts are not of one length, each is repeated until
            they are: attention to a prompt is the same however often it stands there. That takes time if the lengths
            have no common factor.

    Returns:
        (prompts and uncond_prompts, 77 * chunks, 768) on the text encoder's device, in its dtype; with mask_padding as
        many tokens as it takes. With prompt editing a function context(step, n_steps) that returns it, and encodes
        when it is called what it has not encoded before.

    Raises:
        ValueError: an argument is out of range, or a prompt holds `AND` or a weight that is no number.
    """
    model_loader.check_tokenizer(tokenizer, clip.config.n_vocab)
    texts = check_texts(prompts, uncond_prompts)
    if clip_skip not in range(1, clip.config.n_layers + 1):
        raise ValueError(f"clip_skip is {clip_skip!r}; give a whole number from 1 to {clip.config.n_layers}")
    split = make_splitter(tokenizer, embeddings, clip.config)

    @functools.cache
    @torch.no_grad()
    def encode(*texts):
        rows = [split_chunks(text, split, clip.config.n_tokens - 2) for text in texts]
        n_chunks = max(map(len, rows))
        chunks = [chunk for row in rows for chunk in row + [[]] * (n_chunks - len(row))]
        z = encode_chunks(chunks, clip, tokenizer, clip_skip).unflatten(0, (len(rows), n_chunks))
        return without_padding(z, rows) if mask_padding else z.flatten(1, 2)

    if all(at_step(text, 0, 1) == text for text in texts):
        return encode(*texts)
    return lambda step, n_steps: encode(*(at_step(text, step, n_steps) for text in texts))


def check_texts(prompts, uncond_prompts):
    """Returns all prompts in one list. Raises ValueError for what cannot be encoded."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(uncond_prompts, str):
        uncond_prompts = [uncond_prompts] * len(prompts)
    texts = [*prompts, *uncond_prompts]
    if not prompts or len(texts) not in (len(prompts), 2 * len(prompts)):
        raise ValueError(f"there are {len(prompts)} prompts and {len(texts) - len(prompts)} uncond_prompts; give one "
                         f"prompt or more, and of uncond_prompts one for all, as many, or []")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is {text!r:.80}; give texts")
        parse(text)  # a weight that is no number is seen here, not in the middle of a picture
    for text in prompts:  # to the web UIs, too, what follows is plain text in a negative prompt
        if re.search(r"\bAND\b", text):
            raise ValueError(f"AND, which composes several prompts, is not supported, in the prompt {text!r:.80}; "
                             f"write 'and' for the word, or a comma")
        for tag in re.findall(r"<\w+:[^>]+>", text):
            warnings.warn(f"{tag} is read as words; extensions/lora.py adds a LoRA, on the command line this does too",
                          stacklevel=3)
    return texts


def plain_text(prompt: str, embeddings: Iterable[str] = ()) -> str:
    """Returns the words of a prompt, of its first and last step, without its grammar and the names of embeddings."""
    texts = dict.fromkeys(at_step(prompt, step, 2) for step in range(2))
    text = " ".join(text for one in texts for text, weight in parse(one) if weight != -1)
    for name in sorted(embeddings, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text, flags=re.IGNORECASE)
    return text


def make_splitter(tokenizer, embeddings, config):
    """Returns a function that splits a text into words: lists of (token id, None), or of (token id, vector)."""
    names = {name: tokenizer(name, add_special_tokens=False).input_ids for name in embeddings}
    if not all(names.values()):
        raise ValueError(f"the names of embeddings are {', '.join(map(repr, names))}; give each one that is not empty")
    longest_first = sorted(names, key=lambda name: -len(names[name]))
    # Names such as <cat> would become one token with a comma after them, so they are set apart first.
    marked = sorted((name for name in names if not (name[0] + name[-1]).isalnum()), key=len, reverse=True)
    marked = re.compile(f"({'|'.join(map(re.escape, marked)) or '(?!)'})", re.IGNORECASE)

    def split(text: str) -> Iterator[list]:
        parts = tokenizer(marked.split(text), add_special_tokens=False, verbose=False).input_ids
        ids = [token for part in parts for token in part]
        while ids:
            name = next((name for name in longest_first if ids[: len(names[name])] == names[name]), None)
            vectors = [None] if name is None else check_vectors(name, embeddings[name], config)
            yield [(ids[0], vector) for vector in vectors]
            ids = ids[1 if name is None else len(names[name]) :]

    return split


def check_vectors(name, vectors, config):
    """Returns an embedding's vectors (n, d_embed), or raises ValueError. Asked for only where a prompt has the name, as
    a folder may hold embeddings of other models."""
    vectors = torch.atleast_2d(torch.as_tensor(vectors))
    if vectors.ndim == 2 and vectors.shape[1] == config.d_embed and 0 < len(vectors) <= config.n_tokens - 2:
        return vectors
    raise ValueError(f"the embedding {name!r} has the shape {tuple(vectors.shape)}, which does not fit this text "
                     f"encoder; it takes (n, {config.d_embed}), n from 1 to {config.n_tokens - 2}")


def split_chunks(prompt, split, size):
    """Returns the chunks of a prompt, at least one: lists of at most `size` (token id, vector or None, weight)."""
    comma, = split(",")
    chunks, chunk, after_comma = [], [], 0  # how much of the chunk goes to its last comma
    for text, weight in parse(prompt):
        if (text, weight) == ("BREAK", -1):
            chunks.append(chunk)
            chunk, after_comma = [], 0
            continue
        for word in split(text):
            is_comma = word == comma
            rest = []
            if len(chunk) + len(word) > size:
                if len(chunk) == size and not is_comma and after_comma and size - after_comma < COMMA_BACKTRACK:
                    chunk, rest = chunk[:after_comma], chunk[after_comma:]
                chunks.append(chunk)
                chunk, after_comma = rest, 0
            if len(chunk) + len(word) > size:  # an embedding of many vectors, after what the comma has let go
                chunks.append(chunk)
                chunk = []
            chunk = chunk + [(token, vector, weight) for token, vector in word]
            if is_comma:
                after_comma = len(chunk)
    if chunk or not chunks:
        chunks.append(chunk)
    return chunks


def encode_chunks(chunks, clip, tokenizer, clip_skip):
    """Returns (chunks, 77, d_embed), weighted, for lists of (token id, vector or None, weight)."""
    n_tokens = clip.config.n_tokens
    tokens = torch.full((len(chunks), n_tokens), tokenizer.eos_token_id)
    weights = torch.ones(len(chunks), n_tokens)
    tokens[:, 0] = tokenizer.bos_token_id
    vectors = {}
    for row, chunk in enumerate(chunks):
        for column, (token, vector, weight) in enumerate(chunk, 1):
            tokens[row, column], weights[row, column] = token, weight
            if vector is not None:
                vectors[row, column] = vector

    device = device_of(clip)
    tokens, weights = tokens.to(device), weights.to(device)
    if vectors or clip_skip > 1:
        if not hasattr(clip, "transform"):
            raise ValueError(f"embeddings and clip_skip need the text encoder itself, a clip.CLIP; this is a "
                             f"{type(clip).__name__}")
        x = clip.token_embedding(tokens).clone()  # (chunks, 77, d_embed)
        for place, vector in vectors.items():
            x[place] = vector.to(x)
        z = clip.transform(x, clip.config.n_layers + 1 - int(clip_skip))
    else:
        z = clip(tokens)
    return weigh(z, weights)


def weigh(z: Tensor, weights: Tensor) -> Tensor:
    """Multiplies vectors (chunks, tokens, d) by weights (chunks, tokens), and keeps the mean of each chunk."""
    weighted = z * weights[:, :, None]  # in float32 at least, as the weights are
    before = z.mean(dim=(1, 2), keepdim=True, dtype=weighted.dtype)
    after = weighted.mean(dim=(1, 2), keepdim=True)
    return (weighted * torch.where(after == 0, 1, before / after)).to(z.dtype)


def without_padding(z, rows):
    """Returns (rows, tokens, d) of (rows, chunks, 77, d): each row's own tokens, repeated to the same number."""
    kept = [torch.cat([z[i, j, : len(chunk) + 2] for j, chunk in enumerate(row)]) for i, row in enumerate(rows)]
    n_tokens = math.lcm(*map(len, kept))
    limit = z.shape[2] ** 2  # what any two chunks can come to
    if n_tokens > limit:
        lengths = ", ".join(str(len(row)) for row in kept)
        raise ValueError(f"without padding, prompts of {lengths} tokens would have to be repeated to {n_tokens}, and "
                         f"{limit} is the most; draw them one at a time, or add a word to one")
    return torch.stack([row.repeat(n_tokens // len(row), 1) for row in kept])
