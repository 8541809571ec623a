"""Thinking and answer tokens are counted apart, by ids or by exact decoding."""

import pytest
from conftest import STUDENT
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.prompts.thinking import ThinkingCounter

# Like that of a model that always thinks: the prompt opens the thinking part.
OPENS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
PLAIN = OPENS.replace("<think>\n", "").replace(".split('</think>')[-1]", "")


def pocket():
    return load_tokenizer(resolve_model(str(STUDENT)))


def spelling(template):
    """A tokenizer that spells the tag by several tokens."""
    text = [r"2 + 2 = 4 . think > answer </ thi nk>\boxed"] * 3
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=300, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=template)


def counted(tokenizer, trace):
    """Return the thinking part of a trace as text, and what comes after it."""
    turn = [{"role": "user", "content": "2 + 2 ?"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(trace, add_special_tokens=False)["input_ids"]
    count = ThinkingCounter(tokenizer).count(prompt, trace, ids)
    if count is None:
        return None
    return tokenizer.decode(ids[:count]).strip(), tokenizer.decode(ids[count:]).strip()


@pytest.mark.parametrize("tokenizer", [pocket(), spelling(OPENS)], ids=["a token", "spelled"])
@pytest.mark.parametrize(
    "thinking, answer",
    [
        ("<think> 2 + 2 = 4 . </think>", "answer 4"),
        ("<think> 2 </think> 2 + 2 = 4 . </think>", "answer 4"),
        ("<think> 2 + 2 = 4 .", ""),
        ("<think> 2 + 2 = 4 . </think>", ""),
        ("2 + 2 = 4 . </think>", "answer 4"),
    ],
)
def test_thinking_ends_with_its_last_closing_tag(tokenizer, thinking, answer):
    assert counted(tokenizer, f"{thinking} {answer}") == (thinking, answer)


def test_a_token_that_spans_both_parts_is_thinking():
    tokenizer = spelling(OPENS)
    assert ">\\" in tokenizer.get_vocab()
    assert counted(tokenizer, "<think> 2 </think>\\boxed") == ("<think> 2 </think>\\", "boxed")


def test_a_prompt_may_open_the_thinking_and_a_model_may_have_none():
    # Cut off before its end.
    assert counted(spelling(OPENS), "2 + 2 = 4 .") == ("2 + 2 = 4 .", "")
    assert counted(spelling(PLAIN), "2 + 2 = 4 .") is None
    # A model that can think and did not.
    assert counted(pocket(), "answer 4") == ("", "answer 4")
