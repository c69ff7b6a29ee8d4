"""What became of the prompts of a dataset of answers, in words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What is known of answers beside themselves. All but the first are left out of the dataset."""

    cut_off: int = 0  # answers at the length limit; left out unless they are wanted
    blank: int = 0  # answers that say nothing, which no trainer takes
    filtered: int = 0  # answers that a content filter of the server stopped
    refused: int = 0  # answers in which the model refuses, as the server says
    malformed: int = 0  # answers that no dataset may hold: calls without a name, half a surrogate pair
    rejected: int = 0  # prompts that the server did not take
    prompt_tokens: int = 0  # read, once for each request
    completion_tokens: int = 0  # written, reasoning and answers that are left out included

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


_IN_WORDS = {
    "blank": "{} were blank",
    "filtered": "{} were stopped by a content filter",
    "refused": "{} were refusals",
    "malformed": "{} were malformed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of the prompts."""

    prompts: int
    written: int  # answers
    counts: Counts

    def sentence(self) -> str:
        """For a person."""
        left_out = self._left_out() or ["0 were blank"]
        rejected = f"; {self.counts.rejected} prompts were rejected" if self.counts.rejected else ""
        answers = "1 answer" if self.written == 1 else f"{self.written} answers"
        return (
            f"{answers} to {self.prompts} prompts; {self.counts.cut_off} reached the length limit, "
            f"{', '.join(left_out)} and left out{rejected}. A trainer skips answers that it reads otherwise than they "
            "were sampled with data.unusable: drop"
        )

    def json(self) -> str:
        """For a machine, on one line."""
        return json.dumps({"prompts": self.prompts, "written": self.written, **asdict(self.counts)})

    def why_nothing(self, *, keeps_cut_off: bool) -> str:
        """Where no answer was written, what would change that."""
        if not self.prompts:
            return "there are no prompts"
        why = self._left_out()
        if self.counts.rejected:
            why.append(f"{self.counts.rejected} prompts were rejected")
        if keeps_cut_off or not self.counts.cut_off:
            return f"no answer is left: {', '.join(why)}"
        others = f" ({', '.join(why)})" if why else ""
        return (
            f"{self.counts.cut_off} answers reached the length limit{others}; give a larger --max-new-tokens, or "
            "--keep-cut-off to have them as they are"
        )

    def _left_out(self) -> list[str]:
        counted = asdict(self.counts)
        return [words.format(counted[name]) for name, words in _IN_WORDS.items() if counted[name]]
