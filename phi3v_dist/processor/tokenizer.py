"""The tokenizer: loaded so that it gives the published ids, or trained for a tiny model.

AutoTokenizer of transformers 5.23 builds a rewritten LlamaTokenizer from Phi-3's files, which gives other ids
for 13 of 23 test strings. `PreTrainedTokenizerFast` on tokenizer.json itself is exact with every version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shards.common.errors import BadInputError

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\\n' -}}{% endif %}"
)
_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
}
# Special tokens of the published vocabulary; True where white space after the token is removed (rstrip).
_TINY_TOKENS = {
    "<unk>": False,
    "<s>": False,
    "</s>": True,
    "<|endoftext|>": False,
    "<|assistant|>": True,
    "<|system|>": False,
    "<|end|>": False,
    "<|user|>": False,
    "<|image|>": True,
}


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory (tokenizer.json), with Phi-3's special tokens and chat
    template.

    Raises BadInputError if tokenizer.json is missing, unreadable, or lacks Phi-3's special tokens.
    """
    file = Path(directory) / "tokenizer.json"
    if not file.exists():
        raise BadInputError(f"{directory}: no tokenizer.json; download it with the model's other files")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception
        raise BadInputError(f"{file}: not a tokenizer ({error}); download it again") from error
    for token in ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"):
        if backend.token_to_id(token) is None:
            raise BadInputError(f"{file}: no token {token}, so this is not Phi-3's; use the model's own")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", model_max_length=131072, **_SPECIAL
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def copy_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json to `directory`."""
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    save_tokenizer_config(directory)


def save_tokenizer_config(directory: Path) -> None:
    """Writes tokenizer_config.json and special_tokens_map.json beside a tokenizer.json."""
    config: dict[str, Any] = {
        **_SPECIAL,
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 131072,
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(_SPECIAL, indent=2) + "\n")


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int) -> None:
    """Trains a small BPE tokenizer on `texts` for a tiny model and writes it to `directory`; deterministic.

    Normaliser, decoder, special tokens and the `<s>` before every piece are those of Phi-3; the ids are not.
    No token spans two words, and each digit is a token. vocab_size: tokens at most, special ones included.
    """
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(t, rstrip=r, special=True, normalized=False) for t, r in _TINY_TOKENS.items()
        ],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    save_tokenizer_config(directory)
