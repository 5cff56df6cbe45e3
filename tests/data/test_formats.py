"""Rows to tokens, and which of them are learned."""

import numpy as np
import pytest

from tuning.data import formats
from tuning.data.formats import FORMATS, auto, messages, pairs, text
from tuning.data.reader import Reader

from .conftest import CHATML


def example(format, tokenizer, row):
    return format(Reader(tokenizer))([row])[0]


def seen(format, tokenizer, row):
    """The tokens, and whether each is learned: as the target of the one before it. The first never is."""
    tokens, targets, learned = example(format, tokenizer, row)[:3]
    assert targets[:-1].tolist() == tokens[1:].tolist()
    assert not learned[-1]
    return tokens, np.append(False, learned[:-1])


def marked(format, tokenizer, row):
    """The example as text, learned runs in «»."""
    tokens, learned = seen(format, tokenizer, row)
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(learned)) + 1)
    words = [(tokenizer.decode(tokens[run].tolist(), clean_up_tokenization_spaces=False), learned[run[0]]) for run in runs]
    return "".join(f"«{word}»" if yes else word for word, yes in words)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Text and pairs.


def test_text_is_learned_whole_with_its_end(plain):
    tokens, learned = seen(text(), plain, {"text": "The cat"})
    assert tokens.tolist() == [*ids(plain, "The cat"), plain.eos_token_id]
    assert learned[1:].all()
    assert tokens.dtype == np.int32


def test_the_start_token_stands_once_and_is_not_learned(started):
    tokens, learned = seen(text(), started, {"text": "The cat"})
    assert tokens.tolist() == [started.bos_token_id, *ids(started, "The cat"), started.eos_token_id]
    assert learned.tolist() == [False] + [True] * (len(tokens) - 1)


def test_rendered_text_brings_its_own_start_and_end(started):
    expected = [started.bos_token_id, *ids(started, "The cat"), started.eos_token_id]
    for body in ("<s>The cat</s>", "The cat</s>", "<s>The cat", "The cat"):
        assert example(text(control=True), started, {"text": body}).tokens.tolist() == expected


def test_control_tokens_in_plain_text_are_letters(started):
    for format, row in ((text(), {"text": "a</s>b<s>"}), (pairs(), {"prompt": "a<s>", "completion": "</s>b<pad>"})):
        tokens = example(format, started, row).tokens.tolist()
        assert tokens.count(started.eos_token_id) == tokens.count(started.bos_token_id) == 1
        assert started.pad_token_id not in tokens
        assert started.decode(tokens[1:-1]) == "".join(row.values())


def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(started):
    tokens, learned = seen(pairs(), started, {"prompt": "how many", "completion": " 12 apples"})
    prompt, completion = ids(started, "how many"), ids(started, " 12 apples")
    assert tokens.tolist() == [started.bos_token_id, *prompt, *completion, started.eos_token_id]
    assert learned.tolist() == [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)


def test_templates_fill_in_columns(plain):
    format = pairs(prompt="Question: {question}\nAnswer:", completion=" {answer}")
    assert marked(format, plain, {"question": "how {many}?", "answer": "12", "n": 3}) == "Question: how {many}?\nAnswer:« 12</s>»"
    assert marked(pairs(prompt="q", completion="{{{a}}}"), plain, {"q": "x", "a": "y"}) == "x«{y}</s>»"


def test_the_end_token_is_learned_when_it_is_the_padding(plain):
    assert plain.pad_token_id == plain.eos_token_id
    tokens, learned = seen(pairs(), plain, {"prompt": "a", "completion": "b"})
    assert tokens[-1] == plain.eos_token_id
    assert learned[-1]


def test_a_continuation_gets_no_space_of_its_own(spaced):
    tokens, learned = seen(pairs(), spaced, {"prompt": "The", "completion": " cat"})
    assert spaced.convert_ids_to_tokens(tokens.tolist()) == ["<s>", "▁The", "▁cat", "</s>"]
    assert learned.tolist() == [False, False, True, True]
    assert spaced.convert_ids_to_tokens(example(text(), spaced, {"text": "The cat"}).tokens.tolist()) == ["<s>", "▁The", "▁cat", "</s>"]


def test_many_rows_are_tokenised_as_each_alone(started):
    rows = [{"prompt": "how" * n, "completion": " 12" * (5 - n)} for n in range(5)]
    for row, together in zip(rows, pairs()(Reader(started))(rows), strict=True):
        alone = example(pairs(), started, row)
        assert together.tokens.tolist() == alone.tokens.tolist()
        assert together.learned.tolist() == alone.learned.tolist()


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (text(), {"body": "a", "n": 1}, "no column 'text'; the columns are 'body', 'n'"),
        (text(), {"text": None}, "Column 'text' is null"),
        (text(), {"text": 3}, "Column 'text' is 3; text is needed"),
        (pairs(prompt="question"), {"prompt": "a", "completion": "b"}, "no column 'question'; the columns are 'prompt', 'completion'"),
        (pairs(), {"prompt": "a", "completion": None}, "Column 'completion' is null"),
        (pairs(prompt="{a.b}"), {"a": "x", "completion": "b"}, "no column 'a.b'"),
        (messages(), {"messages": "hello"}, "a list of"),
        (messages(), {"messages": []}, "a list of"),
        (messages(), {"messages": None}, "Column 'messages' is None"),
        (messages(), {"messages": [{"role": "user", "content": None}]}, "turn 1 is .*'role' and 'content'"),
        (messages(), {"messages": [{"role": "user", "content": ["a"]}]}, "turn 1 is .*both text"),
        (messages(), {"messages": [{"from": "human", "value": "a"}]}, "turn 1 is .*'role' and 'content'"),
        (messages(), {"messages": [{"role": "assistant", "content": "a"}]}, "begins with the assistant's turn"),
        (messages(), {"messages": [{"role": "user", "content": "\ufdd0"}]}, r"U\+FDD0"),
        (auto(), {"question": "a", "answer": "b"}, "The columns are 'question', 'answer'; no format fits"),
        (auto(), {"text": "a", "messages": []}, "both text and messages fit"),
    ],
)
def test_a_wrong_row_says_what_is_there(chat, format, row, message):
    with pytest.raises(ValueError, match=message):
        example(format, chat, row)


@pytest.mark.parametrize("template", ["{question", "Question:}", "{}", "{{no}}", "{a!r}", "{a:>5}"])
def test_a_template_without_plain_columns_is_refused(template):
    with pytest.raises(ValueError, match="A brace that is text is written twice"):
        pairs(prompt=template)


def test_a_tokenizer_without_an_end_is_refused_where_one_is_needed(endless):
    for format in (text(), pairs()):
        with pytest.raises(ValueError, match=r"no end token.*Set its eos_token"):
            format(Reader(endless))


def test_auto_takes_the_format_that_the_columns_name(chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {"text": {"text": "a", "label": 1}, "pairs": {"prompt": "a", "completion": "b"}, "messages": {"messages": turns}}
    for name, row in rows.items():
        for found, expected in zip(example(auto(), chat, row)[:3], example(FORMATS[name](), chat, row)[:3], strict=True):
            assert found.tolist() == expected.tolist()


# Conversations.

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there", "tool_calls": None},
    {"role": "user", "content": "12?"},
    {"role": "assistant", "content": " yes\n"},
]
SYSTEM, USER, AGAIN = (
    "<|im_start|>system\nbe kind<|im_end|>\n",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "\n<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n",
)
MARKERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKERS], ids=["plain", "generation markers"])
def test_answers_and_their_end_of_turn_are_learned_and_nothing_else(chat, template):
    chat.chat_template = template
    shown = {learn: marked(messages(learn=learn), chat, {"messages": TURNS}) for learn in formats.LEARN}
    assert shown["assistant"] == f"{SYSTEM}{USER}«hi there<|im_end|>»{AGAIN}« yes\n<|im_end|>»\n"
    assert shown["last"] == f"{SYSTEM}{USER}hi there<|im_end|>{AGAIN}« yes\n<|im_end|>»\n"
    assert shown["all"] == f"<|im_start|>«{SYSTEM.removeprefix('<|im_start|>')}{USER}hi there<|im_end|>{AGAIN} yes\n<|im_end|>\n»"


def test_the_mask_is_that_of_the_generation_markers(chat):
    chat.chat_template = MARKERS
    oracle = chat.apply_chat_template(TURNS[:3], return_dict=True, return_assistant_tokens_mask=True)
    tokens, learned = seen(messages(), chat, {"messages": TURNS[:3]})
    assert tokens.tolist() == oracle["input_ids"]
    assert learned.astype(int).tolist() == oracle["assistant_masks"]


def test_the_prompt_of_an_answer_is_what_the_model_meets_when_it_generates(chat):
    tokens, learned = seen(messages(learn="last"), chat, {"messages": TURNS})
    prompt = chat.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert tokens[: len(prompt)].tolist() == prompt
    assert np.argmax(learned) == len(prompt)


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
SQUEEZED = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")


@pytest.mark.parametrize("template", [INST, SQUEEZED])
@pytest.mark.parametrize("name", ["started", "spaced"])
def test_pieces_of_a_conversation_are_the_tokens_of_its_rendering(request, name, template):
    tokenizer = request.getfixturevalue(name)
    tokenizer.chat_template = template
    turns = [dict(turn, content=turn["content"].strip()) for turn in TURNS[1:]]
    tokens, learned = seen(messages(), tokenizer, {"messages": turns})
    assert tokens.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    assert (tokens[learned] == tokenizer.eos_token_id).sum() == 2


def test_a_control_token_that_takes_the_line_break_after_it_is_learned_alone(chat):
    from tokenizers import AddedToken

    chat.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    chat.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    tokens, learned = seen(messages(), chat, {"messages": TURNS[1:4]})
    assert tokens.tolist() == chat.apply_chat_template(TURNS[1:4], return_dict=False)
    assert chat.decode(tokens[learned].tolist()) == "hi there<|end|>"


def test_a_template_that_writes_the_start_token_is_not_given_another(started):
    started.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "#").replace("<|im_end|>", "</s>")
    assert marked(messages(), started, {"messages": TURNS[1:3]}) == "<s>#user\nhello</s>\n#assistant\n«hi there</s>»\n"


def test_control_tokens_typed_in_a_conversation_are_letters(chat):
    clean = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    typed = [
        {"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nyes"},
        {"role": "assistant", "content": "b<|im_start|><|im_end|>", "name": "<|im_end|>"},
    ]
    start, end = chat.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    normal, odd = (example(messages(), chat, {"messages": turns}) for turns in (clean, typed))
    for token in (start, end):
        assert odd.tokens.tolist().count(token) == normal.tokens.tolist().count(token)
    body = "b<|im_start|><|im_end|>"
    expected = f"<|im_start|>user\n{typed[0]['content']}<|im_end|>\n<|im_start|>assistant\n«{body}<|im_end|>»\n"
    assert marked(messages(), chat, {"messages": typed}) == expected
    assert example(messages(learn="all"), chat, {"messages": typed}).tokens.tolist() == odd.tokens.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused(chat):
    chat.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    turns = [dict(turn, content="<think>hm</think>" * (turn["role"] == "assistant") + turn["content"]) for turn in TURNS]
    with pytest.raises(ValueError, match=r"became .* rewrites earlier turns .*Set format.learn=last"):
        example(messages(), chat, {"messages": turns})
    alone = turns[1:3]
    assert "«<think>hm</think>hi there<|im_end|>»" in marked(messages(learn="last"), chat, {"messages": alone})


def test_a_template_without_a_generation_prompt_is_refused(chat):
    chat.chat_template = CHATML[: CHATML.index("{% if add_generation_prompt")]
    with pytest.raises(ValueError, match="ignores add_generation_prompt"):
        example(messages(), chat, {"messages": TURNS})


def test_a_template_that_does_not_end_answers_is_refused(chat):
    chat.chat_template = CHATML.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="would not learn to stop"):
        example(messages(), chat, {"messages": TURNS})


def test_a_template_that_refuses_is_quoted(chat):
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"refuses the first \d turns: roles must alternate"):
        example(messages(), chat, {"messages": TURNS})


def test_a_tokenizer_without_a_chat_template_is_refused(plain):
    with pytest.raises(ValueError, match="no chat template"):
        messages()(Reader(plain))


def test_learn_names_what_exists():
    with pytest.raises(ValueError, match=r"format\.learn='user' is not one of assistant, all, last"):
        messages(learn="user")


def test_a_conversation_without_an_answer_has_nothing_learned(chat):
    assert not example(messages(), chat, {"messages": TURNS[:2]}).learned.any()


def test_tools_reach_the_template(chat):
    chat.chat_template = "{% if tools %}{{ tools[0].name }}\n{% endif %}" + CHATML
    row = {"messages": TURNS[1:3], "tools": '[{"name": "search"}]'}
    assert marked(messages(), chat, row).startswith("search\n<|im_start|>user")
    assert marked(messages(), chat, {**row, "tools": None}).startswith("<|im_start|>user")
