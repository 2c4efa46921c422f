"""Counts rows that leave a model nothing to answer: empty texts, empty answers, conversations without an answer."""

from collections.abc import Mapping
from typing import Any

from slsam_peft.errors import UserError

# Where a message says something: what it answers, what it calls, and what it thinks before that.
_SAYING = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")


class Emptiness:
    """Counts rows one by one. Rows of token ids are not looked into.

    Args:
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Attributes:
        rows (`int`): All rows so far.
        empty (`int`): Rows with an answer, or one of several, that is empty.
        silent (`int`): Rows of which all answers are.
        unanswered (`int`): Conversations under `messages` without any message of the assistant's.
    """

    def __init__(self, text_field: str = "text") -> None:
        self.text_field = text_field
        self.rows = self.empty = self.silent = self.unanswered = 0
        self._first_empty = self._first_unanswered = self._column = ""

    def add(self, where: str, kind: str, row: Mapping[str, Any]) -> None:
        """Count one more row.

        Args:
            where (`str`): Its place.
            kind (`str`): Its kind, see `slsam_peft.data.rows.kind_of`.
            row (`Mapping[str, Any]`): It, as TRL takes it.
        """
        self.rows += 1
        if kind == "tokenized":
            return
        said = _answers(kind, row, self.text_field)
        if not said:
            self.unanswered += 1
            self._first_unanswered = self._first_unanswered or where
        elif not all(said):
            self.empty += 1
            self.silent += not any(said)
            self._first_empty = self._first_empty or where
            self._column = {"text": self.text_field, "messages": "messages"}.get(kind, "completion")

    def check(self) -> None:
        """Refuse rows of which not one has anything to learn.

        Raises:
            UserError: the answers of all rows are empty. The message says where the first one is.
        """
        if self.rows and self.silent == self.rows:
            others = "" if self.rows == 1 else f", as it is in all {self.rows} rows"
            raise UserError(
                f"{self._first_empty}: there is nothing to learn: the answer, in {self._column!r}, is empty{others}. "
                "Write into it what the model is to say."
            )

    def sentences(self) -> list[str]:
        """Return what there is to say of all rows so far."""
        said = []
        if self.empty:
            said.append(
                f"{self.empty} of {self.rows} rows have an empty answer, in {self._column!r}, and teach the model to "
                f"say nothing; first: {self._first_empty}. Leave them out unless that is meant."
            )
        if self.unanswered:
            said.append(
                f"{self.unanswered} of {self.rows} rows have no message of the assistant's, so that no answer is "
                f"learnt from them; first: {self._first_unanswered}."
            )
        return said


def _answers(kind: str, row: Mapping[str, Any], text_field: str) -> list[bool]:
    """Return, for each answer of a row, whether it says anything; none where a conversation has no answer."""
    if kind in ("text", "prompt-completion"):
        return [bool(row[text_field if kind == "text" else "completion"])]
    messages = row["messages" if kind == "messages" else "completion"]
    spoken = [message for message in messages if message.get("role") == "assistant"]
    if kind != "messages":  # a completion is what is to be learnt, whoever says it
        spoken = spoken or messages
    return [says_anything(message) for message in spoken]


def says_anything(message: Mapping[str, Any]) -> bool:
    """Return whether a message has a text, a part that is no empty text, a call of a tool or a thought."""
    return any(_holds(message.get(name)) for name in _SAYING)


def _holds(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value)
    return any(not isinstance(part, dict) or part.get("type") != "text" or bool(part.get("text")) for part in value)
