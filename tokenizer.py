"""CLIP's tokenizer without transformers, whose import takes longer than a picture: what `generate` draws with.

The parts are those that `transformers.CLIPTokenizer` is made of, from the same library, so the ids are the same.
"""

from types import SimpleNamespace

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import RobertaProcessing

START, END = "<|startoftext|>", "<|endoftext|>"
# What becomes a word of its own before pairs are merged: special tokens, English endings, letters, digits one by one,
# all else but white space (the pattern of OpenAI's simple_tokenizer.py).
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Is called as a `transformers` tokenizer is: `tokenizer(texts).input_ids`.

    Args:
        vocab, merges: paths of CLIP's two files.
    """

    def __init__(self, vocab, merges):
        backend = Backend(BPE.from_file(str(vocab), str(merges), unk_token=END, end_of_word_suffix="</w>",
                                       continuing_subword_prefix=""))
        backend.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
        backend.pre_tokenizer = PreTokenizers([Split(Regex(WORDS), behavior="removed", invert=True),
                                               ByteLevel(add_prefix_space=False)])
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
        self.bos_token_id, self.eos_token_id = (backend.token_to_id(token) for token in (START, END))
        self.pad_token_id = self.eos_token_id
        backend.post_processor = RobertaProcessing((END, self.eos_token_id), (START, self.bos_token_id),
                                                   trim_offsets=False, add_prefix_space=False)
        backend.decoder = Decoder()
        self.backend = backend

    def __len__(self):
        return self.backend.get_vocab_size()

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, verbose: bool = True):
        """Returns an object whose input_ids are the list of ids of a text, or one list for each of several, neither cut
        off nor padded. `verbose` is for the likeness: there are no warnings."""
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=self.backend.encode(texts, add_special_tokens=add_special_tokens).ids)
        return SimpleNamespace(input_ids=[self(text, add_special_tokens).input_ids for text in texts])

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.backend.id_to_token(token)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False).replace("</w>", " ").strip()
