"""Regular expressions that cannot hang, as Python's `re` can: those of files, and those that people type.

An expression from a file is turned into a nondeterministic automaton whose states are followed all at once (Thompson,
1968), in linear time. So there are no back references and no looking ahead; what such a table is for has none. People
do use them ("every attention but ..."), so what they type, or find in a workflow, is searched for by the package
`regex`, which stops after a time.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

try:
    from re import _constants as constants
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as constants
    import sre_parse as parser

MOST_STATES = 20_000
"""States of all expressions of a table together; repetitions are written out."""
MOST_STEPS = 5_000_000
"""States that all searches in a table may visit together: some seconds of work."""
LONGEST, MOST_REPEATS = 2000, 10_000
"""Characters of a typed expression, and how often its `{n}` may repeat something in all: `regex` writes them out."""
SECONDS = 5.0
"""Time that all searches of a typed expression may take together."""

_PLAIN = re.compile(r"[\w.\-]+")
_CATEGORIES = {
    constants.CATEGORY_DIGIT: str.isdecimal,
    constants.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    constants.CATEGORY_SPACE: str.isspace,
    constants.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    constants.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    constants.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}
_BEGINNINGS = (constants.AT_BEGINNING, constants.AT_BEGINNING_STRING)
_ENDS = (constants.AT_END, constants.AT_END_STRING)
_REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT)

Value = TypeVar("Value")


class TypedPattern:
    """A regular expression that somebody typed, in Python's syntax.

    Args:
        what: Setting that it comes from, for messages.
        expression: The expression.
        example: A sound one, for messages.

    Attributes:
        expression: As it was typed.

    Raises:
        ValueError: It is malformed, or too long.
    """

    def __init__(self, what: str, expression: str, example: str):
        self.expression = expression
        self._named, self._left = f"{what} is {expression[:60]!r}", SECONDS
        repeats = math.prod(int(number) or 1 for number in re.findall(r"(?<=[{,])\d{1,9}", expression))
        if len(expression) > LONGEST or repeats > MOST_REPEATS:
            raise ValueError(
                f"{self._named}, of {len(expression)} characters and {repeats} repetitions; expected at most {LONGEST} "
                f"and {MOST_REPEATS}, for example {example!r}. Write a shorter one."
            )
        import regex

        try:
            self._pattern = regex.compile(expression)
        except (regex.error, RecursionError, UnicodeError, OverflowError) as error:
            raise ValueError(
                f"{self._named}, not a regular expression ({error}); expected for example {example!r}."
            ) from error

    def search(self, text: str) -> bool:
        """Whether the expression is found in a text. Raises ValueError once all searches together take too long."""
        begun = time.monotonic()
        try:
            return self._pattern.search(text, timeout=max(self._left, 0.01)) is not None
        except TimeoutError as error:
            raise ValueError(
                f"{self._named}, which takes more than {SECONDS:g} s to search for in names such as {text[:80]!r}; "
                "expected one without repetitions inside of repetitions, such as (a+)+. Write it without them."
            ) from error
        finally:
            self._left -= time.monotonic() - begun


@dataclass
class _State:
    """A state of the automaton: either it takes a character, or it goes on to `next` without one.

    accepts: Whether a character is taken; None for a state that takes none.
    place: "begin" or "end" for a state that is passed at that place of the text alone.
    """

    next: list[int]
    accepts: Callable[[str], bool] | None = None
    place: str = ""


class _Automaton:
    """An expression as states; state 0 is the end of it, `start` its beginning."""

    def __init__(self, expression: str, most_states: int):
        self.states = [_State([])]
        self._left = most_states
        try:
            parsed = parser.parse(expression)
            if parsed.state.flags & ~re.UNICODE:
                raise ValueError("it sets flags")
            self.start = self._sequence(parsed, 0)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no regular expression ({type(error).__name__}: {error})") from error

    def _add(self, state: _State) -> int:
        self._count()
        self.states.append(state)
        return len(self.states) - 1

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it needs more than {MOST_STATES} states")

    def _sequence(self, items: Any, after: int) -> int:
        """Adds items that follow each other and are followed by state `after`; returns their first state."""
        for operation, argument in reversed(list(items)):
            after = self._item(operation, argument, after)
        return after

    def _item(self, operation: Any, argument: Any, after: int) -> int:
        self._count()
        if operation in _REPEATS:
            return self._repeat(*argument, after)
        if operation is constants.BRANCH:
            return self._add(_State([self._sequence(branch, after) for branch in argument[1]]))
        if operation is constants.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(argument[3], after)
        if operation is constants.AT and argument in (*_BEGINNINGS, *_ENDS):
            return self._add(_State([after], place="begin" if argument in _BEGINNINGS else "end"))
        return self._add(_State([after], _character(operation, argument)))

    def _repeat(self, low: int, high: int, items: Any, after: int) -> int:
        if high is constants.MAXREPEAT:
            loop = self._add(_State([after]))
            self.states[loop].next.append(self._sequence(items, loop))
            after = loop
        for number in range(low if high is constants.MAXREPEAT else high, 0, -1):
            self._count()
            more = self._sequence(items, after if number <= low else self._add(_State([after])))
            after = more if number <= low else self._add(_State([more, after]))
        return after


def _character(operation: Any, argument: Any) -> Callable[[str], bool]:
    """A test for one character; ValueError for an operation that is none."""
    if operation is constants.LITERAL:
        return lambda char: ord(char) == argument
    if operation is constants.NOT_LITERAL:
        return lambda char: ord(char) != argument
    if operation is constants.ANY:
        return lambda char: char != "\n"
    if operation is constants.RANGE:
        return lambda char: argument[0] <= ord(char) <= argument[1]
    if operation is constants.CATEGORY:
        return _CATEGORIES[argument]
    if operation is constants.IN:
        negated = argument[0][0] is constants.NEGATE
        tests = [_character(*item) for item in argument[negated:]]
        return lambda char: any(test(char) for test in tests) != negated
    raise ValueError(f"it has {str(operation).lower().replace('_', ' ')}; expected no look-around or back reference")


class PatternTable(Generic[Value]):
    """Values by the names of layers, given by regular expressions as peft's `alpha_pattern`.

    An expression is compared with each end of a dotted name, such as `attn1.to_q`; the first that matches decides. One
    without special characters (but for the dot, which stands for itself) is looked up, whatever their number.

    Args:
        patterns: Expression -> value, in order.

    Raises:
        ValueError: An expression is malformed, or too long or too many of them; it does not name the file.
    """

    def __init__(self, patterns: Mapping[str, Value]):
        self._values = list(patterns.values())
        self._plain: dict[str, int] = {}
        self._automata: list[tuple[int, _Automaton]] = []
        states, self._steps = MOST_STATES, 0
        for number, text in enumerate(patterns):
            if _PLAIN.fullmatch(text):
                self._plain.setdefault(text, number)
                continue
            try:
                automaton = _Automaton(text, states)
            except ValueError as error:
                raise ValueError(f"the pattern {text[:60]!r} cannot be used: {error}") from error
            states -= len(automaton.states)
            self._automata.append((number, automaton))

    def get(self, name: str) -> Value | None:
        """The value for a name; None where no expression matches. Raises ValueError when all searches take too long."""
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        found = [self._plain[name[start:]] for start in starts if name[start:] in self._plain] if self._plain else []
        first = min(found, default=len(self._values))
        for number, automaton in self._automata:
            if number < first and self._matches(automaton, name, starts):
                first = number
        return self._values[first] if first < len(self._values) else None

    def _matches(self, automaton: _Automaton, name: str, starts: list[int]) -> bool:
        """Whether an end of the name that begins at one of `starts` is the expression's, from its start to its end."""
        begins, states = set(starts), set()
        for place in range(len(name) + 1):
            states |= {automaton.start} if place in begins else set()
            states = self._closure(automaton, states, place, len(name))
            if place < len(name):
                taken = (automaton.states[i] for i in states)
                states = {s.next[0] for s in taken if s.accepts and s.accepts(name[place])}
        return 0 in states

    def _closure(self, automaton: _Automaton, states: set[int], place: int, length: int) -> set[int]:
        """The states that are reached without taking a character."""
        reached, waiting = set(states), list(states)
        while waiting:
            state = automaton.states[waiting.pop()]
            passed = not state.place or place == (0 if state.place == "begin" else length)
            new = set(state.next) - reached if state.accepts is None and passed else set()
            reached |= new
            waiting += new
        self._steps += len(reached) + 1
        if self._steps > MOST_STEPS:
            raise ValueError("its patterns take too long to match")
        return reached
