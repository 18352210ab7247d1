"""The tokenizer against the original one of CLIP, whose ids for a thousand prompts are in tokens.json.gz."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertTokenizer, CLIPTokenizerFast, RobertaTokenizer

from model_loader import check_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB, MERGES = str(ROOT / "data/vocab.json"), str(ROOT / "data/merges.txt")
START, END = 49406, 49407

# Where transformers differs from the original by design: the prompt, and what the original takes it for.
DIFFERENT = {
    "the original has ftfy straighten quotation marks": {
        "“curly” quotes": '"curly" quotes',
        "‘single’ quotes": "'single' quotes",
        "it’s curly": "it's curly",
        "„low‚ quotes": "\"low' quotes",
    },
    "the original has ftfy take ligatures apart": {
        "a ﬁne ﬂower": "a fine flower",
        "ŉ": "'n",
        "ǅ": "dž",
    },
    "the original has ftfy bring characters of full and half width to the usual ones": {
        "ＦＵＬＬ ｗｉｄｔｈ １２３": "full width 123",
        "！？": "!?",
        "ｶﾀｶﾅ": "カタカナ",
    },
    "the original has ftfy mend text read in the wrong encoding": {
        "cafÃ© mojibake": "café mojibake",
        "donâ€™t": "don't",
        "next\x85line": "next…line",
    },
    "the original has ftfy drop control characters": {
        "nul\x00byte": "nulbyte",
        "bell\x07": "bell",
        "unit\x1fseparator": "unitseparator",
        "\x1b[31mred\x1b[0m": "red",
        "\ufeffmark": "mark",
    },
    "the original reads HTML entities, twice": {
        "cats &amp; dogs": "cats & dogs",
        "1 &lt; 2 &gt; 0": "1 < 2 > 0",
        "&quot;quoted&quot;": '"quoted"',
        "caf&eacute;": "café",
        "&#233; &#x1F600;": "é 😀",
        "a &amp;lt; b": "a < b",
        "&nbsp;": "",
        "&copy; 2024": "© 2024",
        "&notanentity;": "¬anentity;",
    },
    "the original's lower case of a Greek capital sigma knows where a word ends": {
        "ΟΔΥΣΣΕΥΣ": "οδυσσευς",
        "ΛΌΓΟΣ λόγος": "λόγος λόγος",
    },
    "open_clip_torch renamed the special tokens": {
        "<|startoftext|>": "<| startoftext |>",
        "a cat<|endoftext|> and a dog": "a cat <| endoftext |> and a dog",
        "<start_of_text>": "<|startoftext|>",
        "a cat<end_of_text> and a dog": "a cat<|endoftext|> and a dog",
    },
}


@pytest.fixture(scope="module")
def original():
    """{prompt: ids}, each row of ids from the start token to the first end token."""
    table = json.loads(gzip.decompress((ROOT / "tests/tokens.json.gz").read_bytes()))
    assert len(table) > 1000
    return table


def ids_of(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]


def padded(ids):
    """The original pads with zeros; Stable Diffusion 1.x was trained with end tokens there."""
    return ids + [END] * (77 - len(ids))


def test_ids_are_those_of_the_original(tokenizer, original):
    different = set().union(*DIFFERENT.values())
    prompts = [prompt for prompt in original if prompt not in different]
    wrong = [prompt for prompt, ids in zip(prompts, ids_of(tokenizer, prompts)) if ids != padded(original[prompt])]
    assert wrong == []


@pytest.mark.parametrize("reason", DIFFERENT)
def test_what_differs_by_design(tokenizer, original, reason):
    for prompt, meaning in DIFFERENT[reason].items():
        ids, ids_of_meaning = ids_of(tokenizer, [prompt, meaning])
        assert ids != padded(original[prompt]), prompt
        # The original stops at an end token in the middle of a prompt: its table does too.
        n = len(original[prompt])
        assert ids_of_meaning[:n] == original[prompt], prompt


def test_padding_and_truncation(tokenizer):
    empty, long = ids_of(tokenizer, ["", "cat " * 200])
    assert empty == [START] + [END] * 76
    assert long == [START] + [2368] * 75 + [END]


def test_loads_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_tokenizer()) == 49408


def test_bare_file_names(tmp_path):
    shutil.copy(VOCAB, tmp_path / "vocab")
    shutil.copy(MERGES, tmp_path / "merges")
    check_tokenizer(load_tokenizer(tmp_path), 49408)


@pytest.mark.parametrize("present", [[], ["vocab.json"], ["vocab.json", "merges"]])
def test_missing_files(tmp_path, present):
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match="expected vocab.json and merges.txt") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_is_drawn_without_importing_transformers():
    code = ("import sys; from pipeline import generate; generate('a red apple', n_inference_steps=1, progress=False);"
            "slow = {'transformers', 'torch._dynamo', 'torch._inductor'} & set(sys.modules); sys.exit(str(slow or 0))")
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr.strip() == "0"


@pytest.fixture(scope="module")
def light():
    return load_tokenizer(with_transformers=False)


def test_the_light_tokenizer_has_the_parts_of_transformers(tokenizer, light):
    ours, theirs = (json.loads(backend.to_str()) for backend in (light.backend, tokenizer.backend_tokenizer))
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor", "decoder"):
        assert ours[part] == theirs[part]
    assert len(light) == len(tokenizer) == 49408
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(light, name) == getattr(tokenizer, name)


def test_the_light_tokenizer_gives_the_same_ids_and_texts(tokenizer, light, original):
    ranges = [(0x20, 0x250), (0x370, 0x600), (0x2000, 0x2100), (0x1F300, 0x1F400)]
    alphabet = [chr(n) for bounds in ranges for n in range(*bounds)]
    draw = random.Random(0)
    prompts = [*original, *("".join(draw.choices(alphabet, k=40)) for _ in range(200)), "cat " * 200]
    for special in (True, False):
        ids = light(prompts, add_special_tokens=special, verbose=False).input_ids
        assert ids == tokenizer(prompts, add_special_tokens=special, verbose=False).input_ids
    assert [light.decode(row) for row in ids] == tokenizer.batch_decode(ids)
    assert light("a cat").input_ids == tokenizer("a cat").input_ids
    check_tokenizer(light, 49408)


def test_the_light_tokenizer_takes_no_cut_off_files(tmp_path):
    shutil.copy(VOCAB, tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("".join(Path(MERGES).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="cut off or edited"):
        load_tokenizer(tmp_path, with_transformers=False)


def test_files_with_other_line_ends_are_the_same(tmp_path, light):
    for path, name in [(VOCAB, "vocab.json"), (MERGES, "merges.txt")]:
        (tmp_path / name).write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path, with_transformers=False)("a red apple").input_ids == light("a red apple").input_ids


def two_tokens(folder):
    """What transformers 5 silently makes of the keywords of transformers 4."""
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


def roberta(folder):
    return RobertaTokenizer(VOCAB, MERGES)


def bert(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "jekyll"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


def bert_of_the_same_size(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(49408 - 5)]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


def padding_of_stable_diffusion_2(folder):
    return CLIPTokenizerFast(VOCAB, MERGES, pad_token="!")


def merges_cut_off(folder):
    (folder / "merges.txt").write_text("".join(Path(MERGES).read_text().splitlines(keepends=True)[:40000]))
    return CLIPTokenizerFast(VOCAB, str(folder / "merges.txt"))


@pytest.mark.parametrize("build, given", [
    (two_tokens, "has 2 tokens"),
    (roberta, "tokens, the text encoder 49408"),
    (bert, "has 6 tokens"),
    (bert_of_the_same_size, r"into \[2, 1, 3, 0\]"),
    (padding_of_stable_diffusion_2, r"into \[49406, 49405, 49407, 0\]"),
    (merges_cut_off, r"into \[49406, .* expects \[49406, 49405, 49407, 49407\]"),
])
def test_wrong_tokenizers_are_refused(tmp_path, build, given):
    with pytest.raises(ValueError, match=given) as error:
        check_tokenizer(build(tmp_path), 49408)
    assert "use model_loader.load_tokenizer()" in str(error.value) and "\n" not in str(error.value)


def test_another_vocabulary_size_is_refused(tokenizer):
    check_tokenizer(tokenizer, 49408)
    with pytest.raises(ValueError, match="has 49408 tokens, the text encoder 30522"):
        check_tokenizer(tokenizer, 30522)
