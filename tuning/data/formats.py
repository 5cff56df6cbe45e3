"""Formats: how a row becomes tokens, and which of them are learned.

A format, bound to a reader, makes examples of rows, many at once: here those of language models, in labels.py those of classifiers.

What a row holds is text. If it spells a control token, such as `<|im_end|>`, it becomes the letters of that word and never the token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tuning.data import columns, frame
from tuning.data.labels import labels, tags
from tuning.data.pieces import Piece, control_tokens, encode, end_id, hide, reveal, start_ids
from tuning.data.reader import Cut, Example, Format, Reader, Row

COLUMNS = {  # the columns that each format reads if it is not told others
    "text": ("text",),
    "pairs": ("prompt", "completion"),
    "messages": ("messages",),
    "labels": ("text", "label"),
    "tags": ("tokens", "tags"),
}


def auto() -> Format:
    """The format whose default columns are there: labels or tags for a model that classifies, else one of text, pairs and messages.

    ValueError if none or several fit.
    """

    def bind(reader: Reader) -> Cut:
        bound: dict[str, Cut] = {}

        def cut(rows: Sequence[Row]) -> list[Example]:
            name = _detect(rows[0], reader)
            if name not in bound:
                bound[name] = FORMATS[name]()(reader)
            return bound[name](rows)

        return cut

    return bind


def _detect(row: Row, reader: Reader) -> str:
    known = ("text", "pairs", "messages") if not reader.classes else ("tags",) if reader.per_token else ("labels",)
    fits = [name for name in known if set(COLUMNS[name]) <= set(row)]
    if len(fits) == 1:
        return fits[0]
    needs = ", ".join(f"{name} needs {' and '.join(map(repr, COLUMNS[name]))}" for name in known)
    said = f"both {' and '.join(fits)} fit" if fits else f"no format fits: {needs}"
    raise ValueError(
        f"The columns are {columns.names(row)}; {said}. Set format.name, and the columns as its keys (format.prompt=question, say)."
    )


def text(*, column: str = "text", control: bool = False) -> Format:
    """Plain text: the start token that the tokenizer puts by default, the text, the end token; all of it is learned.

    control: the text was rendered with control tokens (by a chat template, say) that are to be read as such; a start or end token
    that it brings is not added again.
    """

    def bind(reader: Reader) -> Cut:
        _check(reader, "text")
        tokenizer = reader.tokenizer
        end, start = end_id(tokenizer), start_ids(tokenizer)
        opening, ending = (tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in (start[:1], (end,)))

        def pieces(row: Row) -> list[Piece]:
            body = columns.text(row, column)
            head = () if control and body.startswith(opening) else start
            tail = () if control and body.rstrip().endswith(ending) else (end,)
            return [Piece(ids=head), Piece(body, learned=True, control=control), Piece(ids=tail, learned=True)]

        return lambda rows: encode([pieces(row) for row in rows], tokenizer)

    return bind


def pairs(*, prompt: str = "prompt", completion: str = "completion") -> Format:
    """A prompt, which is read, and its completion, which is learned together with the end token after it.

    Each key names a column, or is a template with columns in braces: prompt="Question: {question}\\nAnswer:", completion=" {answer}".
    Nothing is put between the two. They are tokenised apart, and their ids concatenated: no token spans the boundary.

    An encoder-decoder reads the prompt in its encoder and says the completion, both as the tokenizer frames a text.
    """
    before, after = columns.template(prompt), columns.template(completion)

    def bind(reader: Reader) -> Cut:
        _check(reader, "pairs")
        if reader.kind == "encoder_decoder":
            return _answers_apart(reader, before, after)
        start, end = start_ids(reader.tokenizer), end_id(reader.tokenizer)

        def pieces(row: Row) -> list[Piece]:
            return [Piece(ids=start), Piece(before(row)), Piece(after(row), learned=True), Piece(ids=(end,), learned=True)]

        return lambda rows: encode([pieces(row) for row in rows], reader.tokenizer)

    return bind


def _answers_apart(reader: Reader, before: Callable[[Row], str], after: Callable[[Row], str]) -> Cut:
    """For an encoder-decoder: the decoder starts from its start token and says the completion, to its end."""
    around, start, end = frame.frame(reader.tokenizer), np.array([reader.start], np.int32), end_id(reader.tokenizer)

    def shorten(long: Example, length: int, input_length: int) -> Example:
        assert long.inputs is not None
        tokens, targets, learned = (array[:length] for array in long[:3])
        return Example(tokens, targets, learned, inputs=long.inputs[around.trim(long.inputs, input_length)], shorten=shorten)

    def example(read: np.ndarray, said: np.ndarray) -> Example:
        if not len(read):
            raise ValueError("The prompt is empty, and the tokenizer puts no token of its own around it.")
        targets = said if said[-1:].tolist() == [end] else np.append(said, np.int32(end))
        return Example(np.append(start, targets[:-1]), targets, np.ones(len(targets), bool), inputs=read, shorten=shorten)

    def cut(rows: Sequence[Row]) -> list[Example]:
        framed = zip(around.encode([before(row) for row in rows]), around.encode([after(row) for row in rows]), strict=True)
        return [example(read.tokens, said.tokens) for read, said in framed]

    return cut


LEARN = ("assistant", "all", "last")


def messages(*, column: str = "messages", learn: str = "assistant") -> Format:
    """A conversation, [{"role": ..., "content": ...}, ...], as the tokenizer's chat template renders it.

    learn: "assistant" (the answers, each with its end-of-turn token), "last" (only the last answer) or "all" (every token). An answer is
    what the rendering through it has beyond the rendering before it with the generation prompt; the template needs no markers for that.
    ValueError if one is not a prefix of the other, as when a template rewrites earlier turns. A `tools` column goes to the template.
    """
    if learn not in LEARN:
        raise ValueError(f"format.learn={learn!r} is not one of {', '.join(LEARN)}.")

    def bind(reader: Reader) -> Cut:
        _check(reader, "messages")
        tokenizer = reader.tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, which format 'messages' needs. Set tokenizer.chat_template, or use 'pairs'."
            )
        control = control_tokens(tokenizer)

        def pieces(row: Row) -> list[Piece]:
            typed: list[str] = []  # control tokens that the row's own text spells
            turns, tools = (hide(value, control, typed) for value in (_turns(row, column), _tools(row)))

            def render(count: int, prompt: bool = False) -> str:
                try:
                    return tokenizer.apply_chat_template(turns[:count], tools=tools, tokenize=False, add_generation_prompt=prompt)
                except Exception as error:  # templates raise what they like
                    raise ValueError(f"The chat template refuses the first {count} turns: {error}") from error

            spans = [(render(len(turns)), True)] if learn == "all" else _answers(turns, render, control, learn == "last")
            return [p for body, learned in spans for p in reveal(body, typed, Piece(learned=learned, control=True, stops=learn != "all"))]

        return lambda rows: encode([pieces(row) for row in rows], tokenizer)

    return bind


FORMATS: dict[str, Callable[..., Format]] = {
    "auto": auto, "text": text, "pairs": pairs, "messages": messages, "labels": labels, "tags": tags,
}  # fmt: skip


def _check(reader: Reader, name: str) -> None:
    """ValueError unless the model says text, as the format teaches it to."""
    if reader.classes:
        remedy = "tags" if reader.per_token else "labels"
        raise ValueError(f"Format {name!r} teaches to say text, and the model chooses among its classes. Set format.name={remedy}.")
    if reader.kind == "encoder":
        raise ValueError(
            f"Format {name!r} teaches to say text, which an encoder does not. Set model.head=sequence_classification and "
            "format.name=labels, or token_classification and tags."
        )
    if reader.kind == "encoder_decoder" and name != "pairs":
        raise ValueError(f"An encoder-decoder reads one text and says another, and format {name!r} has one. Set format.name=pairs.")


# Conversations.


def _turns(row: Row, column: str) -> list[dict[str, Any]]:
    """The turns without their null entries, which tables add to have the same keys everywhere. ValueError for what is no conversation."""
    turns = columns.value(row, column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f'Column {column!r} is {repr(turns)[:60]}; a list of {{"role": ..., "content": ...}} is needed there.')
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", ""), str) or not (turn.keys() - {"role"}):
            raise ValueError(f"Column {column!r}, turn {number} is {repr(turn)[:60]}; it needs 'role' and 'content', both text.")
    return turns


def _tools(row: Row) -> Any:
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools or None


def _answers(turns: list[dict[str, Any]], render: Callable[..., str], control: re.Pattern, last: bool) -> list[tuple[str, bool]]:
    """The rendering in spans (text, whether it is an answer)."""
    which = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if which[:1] == [0]:
        raise ValueError("The conversation begins with the assistant's turn: there is nothing that it answers.")
    spans, done = [], ""
    for i in which[-1:] if last else which:
        before, after = render(i, prompt=True), render(i + 1)
        _check_prefix(done, before, f"The rendering of turns 1-{i}", last)
        _check_prefix(before, after, f"The generation prompt after turn {i}", last)
        answer = after[len(before) :]
        _check_end(answer, control, i + 1)
        head = answer[: max(answer.find(turns[i].get("content", "").strip()), 0)]
        if control.search(head) and render(i) == before:  # a model's own channel markers are fine: there the prompt is not ignored
            raise ValueError(
                f"The chat template ignores add_generation_prompt and writes {head[:60]!r} before the answer in turn {i + 1}: the model "
                "would learn to say that. Let the template write it where add_generation_prompt is true."
            )
        spans += [(before[len(done) :], False), (answer, True)]
        done = after
    whole = render(len(turns))
    _check_prefix(done, whole, "The rendering through the last answer", last)
    return [*spans, (whole[len(done) :], False)]


def _check_prefix(short: str, long: str, what: str, last: bool) -> None:
    if long.startswith(short):
        return
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))
    remedy = f"{'M' if last else 'Set format.learn=last, and m'}ake each answer a row of its own that ends with it"
    raise ValueError(
        f"{what} is not how the longer conversation begins: {short[at : at + 30]!r} became {long[at : at + 30]!r}. The chat template "
        f"rewrites earlier turns (some drop the thinking), so which tokens are the answers is not defined. "
        f"{remedy}, or set another chat template."
    )


def _check_end(answer: str, control: re.Pattern, turn: int) -> None:
    ends = [match.end() for match in control.finditer(answer)]
    if not ends or answer[ends[-1] :].strip():
        raise ValueError(
            f"The chat template ends turn {turn} with {answer[-30:]!r}, without a control token: the model would not learn to stop. "
            "Let the template write the end token after each answer."
        )
