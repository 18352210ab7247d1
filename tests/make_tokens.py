"""Makes data/vocab.json, data/merges.txt and tests/tokens.json.gz from the original CLIP tokenizer.

    python tests/make_tokens.py FOLDER

FOLDER holds tokenizer.py and bpe_simple_vocab_16e6.txt.gz: it is `open_clip` of the package open_clip_torch, either
installed with `pip install --no-deps open_clip_torch` or unzipped from its wheel. ftfy and regex must be installed.
"""

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SENTENCES = """
a photograph of an astronaut riding a horse
a futuristic city on Mars during sunset
A Red Apple On A Wooden Table
PORTRAIT OF A LADY WITH AN ERMINE, OIL ON PANEL
mIxEd CaSe wORDs, iPhone, McDonald, eBay
the dog's bone, it's ours, they'll see, we've won, I'm here, she'd go, don't, you're
IT'S OURS, THEY'LL SEE, WE'VE WON, I'M HERE
rock 'n' roll, o'clock, 'tis the season, the boys' room
8k uhd, f/1.8, 35mm, ISO 100, 1920x1080, 3.14159, 1,000,000, 2nd, 50%, $9.99
year 2024, 007, 0, 12:30pm, 1/2, 10^6, v1.5, h264, mp3, 4x4
(masterpiece:1.3), [ugly], {blurry}, <lora:style:0.8>, best_quality, trending on #artstation
snake_case_word, __init__, hello_world, kebab-case-word, state-of-the-art
wow!!! really??? no... hmm… (yes) [no] {maybe}
"quoted" `code` ~tilde~ @name #tag *star* a+b=c a&b a|b \\back\\slash /slash/
http://example.com/path?query=1&other=two#part, name@example.com
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
........ ,,,, ---- ==== //// :::: ;;;; ????
café, naïve, façade, jalapeño, Ångström, Zürich, São Paulo, Łódź, smörgåsbord, Dvořák, crème brûlée
CAFÉ, NAÏVE, FAÇADE, ÅNGSTRÖM, ŁÓDŹ, ÉCOLE, ÑANDÚ, ØRE, ÆON, ŒUVRE
cafe\u0301 nin\u0303o A\u030angstro\u0308m decomposed accents
straße, STRASSE, ß, maße, œuvre, æther, þorn, ðe, ı, ŋ
Москва, белый кот на крыше, МОСКВА, ёлка, Київ, България
Αθήνα, μια γάτα στη στέγη, ΑΘΗΝΑ, λόγος
قطة على السطح, مدينة المستقبل
חתול על הגג, עיר העתיד
छत पर बिल्ली, भविष्य का शहर
แมวบนหลังคา เมืองแห่งอนาคต
mèo trên mái nhà, thành phố tương lai, Việt Nam
kedi çatıda, gelecegin şehri, ğüşöçı
屋根の上の猫, 未来の都市, ひらがな, カタカナ
屋顶上的猫, 未来城市, 一只红苹果
지붕 위의 고양이, 미래 도시
猫cat犬dog mixed 中文 and English 混合
😀 😃 😄 😁 🤣 😂 🙂 😉 😊
a 🐱 on a 🏠 under the 🌙
❤️ ☀️ ✈️ ☎️ ♥ ★ ☆ ☃ ☂ ✓
👍🏽 👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵 1️⃣ #️⃣
x² + y³ = z⁴, H₂O, ½ ¼ ¾, ①②③, Ⅷ, ∑ ∫ √ ∞ ≠ ≤ ± × ÷, 25°C
€100, £50, ¥1000, ₹500, ¢, ©, ®, ™, §, ¶, †, •
em — dash, en – dash, hy-phen, a‑b
«guillemets», ‹single›, ¿qué?, ¡hola!, 「鉤括弧」、。・〜
antidisestablishmentarianism floccinaucinihilipilification supercalifragilisticexpialidocious
asdfghjkl qwertyuiop zxcvbnm aaaaaaaaaaaaaaaaaaaaaaaaaaaa
by greg rutkowski, alphonse mucha, artgerm, unreal engine, octane render, volumetric lighting
lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality
""".strip().split("\n")

# What the original cleans before it splits a prompt into words: white space, HTML entities, and all that ftfy mends.
CLEANED = [
    "", " ", "\n", "  two  spaces  ", "tab\tand\nnew\r\nline", "\u00a0no-break\u00a0space\u00a0", "\u3000wide space",
    "line\u2028separator", "“curly” quotes", "‘single’ quotes", "it’s curly", "„low‚ quotes", "a ﬁne ﬂower", "ŉ", "ǅ",
    "ＦＵＬＬ ｗｉｄｔｈ １２３", "！？", "ｶﾀｶﾅ", "cafÃ© mojibake", "donâ€™t",
    "cats &amp; dogs", "1 &lt; 2 &gt; 0", "&quot;quoted&quot;", "caf&eacute;", "&#233; &#x1F600;", "a &amp;lt; b",
    "&nbsp;", "&copy; 2024", "&notanentity;", "AT&T", "Q&A", "a & b; c",
    "nul\x00byte", "bell\x07", "unit\x1fseparator", "next\x85line", "\x1b[31mred\x1b[0m", "\ufeffmark",
    "a\u200bzero width space", "a\u00adsoft hyphen", "\ufffd replacement", "\U000e0041 tag",
    "İstanbul", "ΟΔΥΣΣΕΥΣ", "ΛΌΓΟΣ λόγος", "Ⓐ circled", "ﷺ", "\u212b", "\u2126 Ohm", "\u0301 a lone accent",
    "e\u0323\u0301 two accents", "\u1100\u1161\u11a8 Hangul letters",
    "<|startoftext|>", "a cat<|endoftext|> and a dog", "<start_of_text>", "a cat<end_of_text> and a dog",
]

# At, just below and far above the limit of 77 tokens.
LONG = [" ".join(["cat"] * n) for n in (74, 75, 76, 77, 200)]
LONG += ["1" * 75, "1" * 76, "😀" * 40, "屋" * 60, "a" * 2000, "antidisestablishmentarianism " * 20]
LONG += [", ".join(SENTENCES[:12])]


def made_up(n):
    """`n` prompts from the words and characters of the sentences, joined in ways that nobody types."""
    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    characters = sorted(set(" ".join(SENTENCES)))
    prompts = []
    for _ in range(n):
        prompt = draw.choice([
            " ".join(draw.choices(words, k=draw.randint(2, 20))),
            draw.choice(["", ", ", "-", "'"]).join(draw.choices(words, k=draw.randint(2, 8))),
            "".join(draw.choices(characters, k=draw.randint(2, 24))),
        ])
        prompts.append(draw.choice([str, str.upper, str.title])(prompt))
    return prompts


def main(folder):
    spec = importlib.util.spec_from_file_location("tokenizer", Path(folder) / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = module.SimpleTokenizer()

    # The package has renamed the last two tokens; everything made for Stable Diffusion knows them as OpenAI had them.
    tokens = list(original.encoder)[:-2] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = ["#version: 0.2"] + [" ".join(pair) for pair in original.bpe_ranks]
    (ROOT / "data/vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    (ROOT / "data/merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")

    words = " ".join(SENTENCES).split()
    # Made-up prompts are there for the splitting, so none that the original mends first, or with a Greek final sigma.
    strange = [prompt for prompt in made_up(600) if module.basic_clean(prompt) == prompt.strip() and "Σ" not in prompt]
    prompts = list(dict.fromkeys(SENTENCES + CLEANED + LONG + words + strange))
    # The original pads with zeros, Stable Diffusion with the end token: the table ends each row with its end token.
    rows = [ids[:ids.index(original.eot_token_id) + 1] for ids in original(prompts).tolist()]
    table = json.dumps(dict(zip(prompts, rows)), separators=(",", ":"))
    (ROOT / "tests/tokens.json.gz").write_bytes(gzip.compress(table.encode(), mtime=0))
    print(f"{len(vocab)} tokens, {len(merges) - 1} merges, {len(prompts)} prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
