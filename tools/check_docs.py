"""Finds what README.md and docs/ say of the project that is not so: links, paths, commands, the tree."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from kdmesh.commands.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:\.ci|benchmarks|docs|examples|kdmesh|proto|services|tests|tools|kdmesh_\w+)/[\w./-]+)[`:]")
_MAKE = re.compile(r"`make ([\w-]+)|^make ([\w-]+)", re.MULTILINE)
_COMMAND = re.compile(r"`kdmesh ([a-z][a-z-]*)|^kdmesh ([a-z][a-z-]*)", re.MULTILINE)
_YAML = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_UNTRACKED = {"runs", "build", "dist", "models", "data"}
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def main() -> int:
    """0 when everything is so; else 1, and a line for each thing that is not."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wrong = [f"{page.relative_to(ROOT)}: {what}" for page in pages for what in _wrong_on(page)]
    wrong += [f"README.md: the tree leaves out {name}" for name in _missing_from_tree((ROOT / "README.md").read_text())]
    sys.stderr.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


def _wrong_on(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    links = [target for target in _LINK.findall(_FENCE.sub("", text)) if "://" not in target]
    yield from (f"the link {target} leads nowhere" for target in links if not _leads_somewhere(page, target))
    yield from (f"there is no {path}" for path in _PATH.findall(text) if not _exists(path))
    targets, commands = _either(_MAKE.findall(text)), _either(_COMMAND.findall(text))
    yield from (f"the Makefile has no target {target}" for target in targets if not _is_make_target(target))
    yield from (f"kdmesh has no command {command}" for command in commands if command not in cli.commands)
    for fragment in _YAML.findall(text):
        try:
            yaml.safe_load(fragment)
        except yaml.YAMLError as error:
            yield f"a YAML fragment cannot be read: {error}"


def _exists(path: str) -> bool:
    return any((base / path).exists() for base in (ROOT, *(ROOT / "services").iterdir()))


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    if not linked.exists() or not anchor:
        return linked.exists()
    return anchor in {_anchor(heading) for heading in _HEADING.findall(_FENCE.sub("", linked.read_text("utf-8")))}


def _anchor(heading: str) -> str:
    """As hosts of Markdown make one."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _is_make_target(target: str) -> bool:
    if target.startswith("bench-"):
        name = target.removeprefix("bench-")
        return name == "NAME" or (ROOT / "benchmarks" / f"{name}.py").exists()
    return re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) is not None


def _either(found: list[tuple[str, ...]]) -> set[str]:
    return {name for groups in found for name in groups if name}


def _missing_from_tree(readme: str) -> Iterator[str]:
    """Packages and modules of kdmesh, and top-level folders, that the tree does not name."""
    tree = readme[readme.index("## The tree") :]
    names = set(re.findall(r"[\w.]+", tree))
    for entry in sorted((ROOT / "kdmesh").iterdir()):
        if (entry.is_dir() or entry.suffix == ".py") and not entry.name.startswith("_") and entry.stem not in names:
            yield f"kdmesh/{entry.name}"
    for entry in sorted(ROOT.iterdir()):
        if (
            entry.is_dir()
            and not entry.name.startswith(".")
            and entry.name not in _UNTRACKED
            and entry.name not in names
        ):
            yield f"{entry.name}/"


if __name__ == "__main__":
    raise SystemExit(main())
