"""What became of the prompts of a dataset of answers, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of the prompts."""

    prompts: int
    written: int
    cut_off: int  # answers at the length limit
    blank: int  # answers that say nothing, which no trainer takes

    def sentence(self) -> str:
        """For a person."""
        return (
            f"{self.written} answers to {self.prompts} prompts; {self.cut_off} reached the length limit, {self.blank} "
            "were blank and left out. A trainer skips answers that it reads otherwise than they were sampled with "
            "data.unusable: drop"
        )

    def why_nothing(self, *, keeps_cut_off: bool) -> str:
        """Where no answer was written, what would change that."""
        if not self.prompts:
            return "there are no prompts"
        if keeps_cut_off or not self.cut_off:
            return f"all {self.blank} answers are blank"
        others = f", and {self.blank} are blank" if self.blank else ""
        return (
            f"{self.cut_off} answers reached the length limit{others}; give a larger --max-new-tokens, or "
            "--keep-cut-off to have them as they are"
        )
