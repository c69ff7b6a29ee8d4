"""A calculator that answers a student: what it writes as calc(17 * 23) is worked out for it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CALL = re.compile(r"calc\(([-+*/(). \d]+)\)")
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def respond(
    messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], *, digits: int = 6
) -> list[dict[str, str]] | None:
    """The value of the last call in the student's turn; one without a call is its answer, and ends the episode."""
    calls = _CALL.findall(messages[-1]["content"])
    return [{"role": "user", "content": _answer(calls[-1], digits)}] if calls else None


def _answer(expression: str, digits: int) -> str:
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):.{digits}g}"
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        return f"not an expression: {type(error).__name__}"  # the student may learn from it


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(ast.dump(node))
