"""The reward `math`: the completion's answer equals the row's as mathematics, by math-verify.

math-verify reads numbers and LaTeX out of both, and compares them with sympy: 1/2, 0.5 and \\frac{1}{2} are equal. It
stops what takes too long by a signal, which needs the main thread of a process: workers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pegbox.errors import ConfigError
from pegbox.section import Section, setting

from pegbox_reward_functions.builtin.said import inside, text_of


class MathOptions(Section):
    """Options of the reward `math`."""

    answer: str = setting("answer", "Column with the right answer: a number, an expression, or LaTeX.", min_length=1)
    tag: str | None = setting(None, "The answer stands in the last <tag>...</tag>; without one it is wrong.")
    boxed: bool = setting(False, "Only an answer in \\boxed{...} counts.")
    timeout_s: int = setting(5, "Longest reading, and longest comparison, of one answer.", unit="seconds", ge=1)
    right: float = setting(1.0, "Reward of a right answer.")
    wrong: float = setting(0.0, "Reward of a wrong one, or of none.")


class Mathematics:
    """Asks math-verify."""

    options = MathOptions

    def open(self, options: MathOptions) -> Callable[..., list[float | None]]:
        try:
            import math_verify  # type: ignore[import-untyped]
        except ImportError as error:
            raise ConfigError(
                "the reward 'math' needs the package math-verify",
                "It reads and compares mathematics.",
                "Type: pip install 'pegbox-reward-functions[math]'",
            ) from error

        read_answer = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
        if not options.boxed:
            read_answer = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

        def parsed(text: str, reading: Sequence[Any] | None = None) -> Any:
            more = {"extraction_config": reading} if reading is not None else {}
            return math_verify.parse(text, parsing_timeout=options.timeout_s, **more)

        def reward(text: str, answer: Any) -> float | None:
            gold = (parsed(f"${answer}$") or parsed(str(answer))) if answer is not None else None
            if not gold:
                return None
            said = inside(text, options.tag) if options.tag is not None else text
            found = parsed(said, read_answer) if said is not None else None
            same = bool(found) and math_verify.verify(gold, found, timeout_seconds=options.timeout_s)
            return options.right if same else options.wrong

        def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
            texts = map(text_of, completions)
            return [reward(text, answer) for text, answer in zip(texts, columns[options.answer], strict=True)]

        score.columns = (options.answer,)  # type: ignore[attr-defined]
        return score


mathematics = Mathematics()
