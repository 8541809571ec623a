"""Build the word-level tokenizer of both pocket models.

It splits text at whitespace, newlines included, and joins words with single spaces, so it restores
the text of the pocket world exactly.
"""

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.pocket.world import vocabulary

END = "<|im_end|>"
MAX_LENGTH = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", END, "<unk>"]
    reasoning = ["<think>", "</think>"]
    words = special + reasoning + vocabulary()
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    # These are not special, so that decoding without special tokens keeps them in a trace.
    tokenizer.add_tokens([AddedToken(word, special=False) for word in reasoning])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, content: str) -> list[int]:
    """Return the token ids of one user message, up to where the assistant's turn begins."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return ids
