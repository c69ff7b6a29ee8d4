"""Holds how the demo makes chats of source code."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from kdmesh.demo.corpus import Corpus, Example, Sizes, build_corpus
from kdmesh.demo.models import Architecture, train_tokenizer, write_model

SIZES = Sizes(max_source=200, max_docstring=100, min_docstring=10)
MODULE = '''
    def greet(name):
        """Return a greeting.

        It is polite.
        """
        # ünicode before the code counts as characters
        return f"hello {name}"

    class Thing:
        @property
        def size(self):
            "Number of parts it has."
            return 3

        def undocumented(self):
            return 1

        def only_documented(self):
            """Nothing but this docstring."""

    async def later(x):
        """Await x, and then some."""
        return await x
'''


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root


def examples(corpus: Corpus) -> dict[str, Example]:
    return {example.docstring: example for example in (*corpus.train, *corpus.held_out)}


def test_a_function_becomes_its_source_without_the_docstring_and_the_docstring(tmp_path: Path) -> None:
    found = examples(build_corpus(SIZES, library=written(tmp_path, {"polite.py": MODULE})))
    assert set(found) == {"Return a greeting.\n\nIt is polite.", "Number of parts it has.", "Await x, and then some."}
    greeting = found["Return a greeting.\n\nIt is polite."]
    assert greeting.source == (
        'def greet(name):\n    # ünicode before the code counts as characters\n    return f"hello {name}"'
    )
    assert found["Number of parts it has."].source == "def size(self):\n    return 3"
    user, assistant = greeting.chat()["messages"]  # type: ignore[misc]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert greeting.source in user["content"]
    assert assistant["content"] == greeting.docstring


def test_functions_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    long_body = "\n".join(f"    x{number} = {number}" for number in range(60))
    module = (
        f'def long(x):\n    """A good docstring."""\n{long_body}\n'
        'def short(x):\n    """Short."""\n    return x\n'
        f'def wordy(x):\n    """{"word " * 40}"""\n    return x\n'
    )
    corpus = build_corpus(SIZES, library=written(tmp_path, {"sizes.py": module}))
    assert examples(corpus) == {}


def test_a_module_lies_on_one_side_only(tmp_path: Path) -> None:
    plus = 'def f{0}(x):\n    """Return x plus {0}, always."""\n    return x + {0}\n'
    minus = 'def g{0}(x):\n    """Return x minus {0}, always."""\n    return x - {0}\n'
    template = plus + minus
    corpus = build_corpus(SIZES, library=written(tmp_path, {f"m{n}.py": template.format(n) for n in range(60)}))
    train, held_out = ({example.module for example in side} for side in (corpus.train, corpus.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert len(corpus.train) + len(corpus.held_out) == 120


def test_tests_duplicates_and_files_that_do_not_parse_are_left_out(tmp_path: Path) -> None:
    files = {"a.py": MODULE, "b.py": MODULE, "test/c.py": MODULE, "pkg/tests/d.py": MODULE, "bad.py": "def (:"}
    corpus = build_corpus(SIZES, library=written(tmp_path, files))
    assert len(corpus.train) + len(corpus.held_out) == 3
    assert {example.module for example in (*corpus.train, *corpus.held_out)} == {"a"}


def test_the_same_library_gives_the_same_corpus(tmp_path: Path) -> None:
    library = written(tmp_path / "library", {"a.py": MODULE})
    first, second = build_corpus(SIZES, library=library), build_corpus(SIZES, library=library)
    assert first == second
    assert first.digest() == second.digest()
    (library / "a.py").write_text((library / "a.py").read_text().replace("+ 3", "+ 4").replace("greeting", "welcome"))
    assert build_corpus(SIZES, library=library).digest() != first.digest()


def test_the_corpus_is_written_as_chat_datasets(tmp_path: Path) -> None:
    corpus = build_corpus(SIZES, library=written(tmp_path / "library", {"a.py": MODULE}))
    corpus.write(tmp_path / "out")
    for name, side in (("train", corpus.train), ("held_out", corpus.held_out)):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert rows == [example.chat() for example in side]


def test_the_model_directories_are_ones_that_the_trainer_takes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from kdmesh.models.directory import check_model_directory
    from kdmesh.models.tokenizer import load_tokenizer

    corpus = build_corpus(SIZES, library=written(tmp_path / "library", {"a.py": MODULE}))
    architecture = Architecture(hidden_size=32, layers=2, heads=2, key_value_heads=1, intermediate_size=48)
    write_model(tmp_path / "model", architecture, train_tokenizer(corpus, 300), max_tokens=64)
    check_model_directory(tmp_path / "model", needs_weights=False)

    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer is not None
    chat = [{"role": "user", "content": "def f(ü): pass"}, {"role": "assistant", "content": "Nothing."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\ndef f(ü): pass<|im_end|>\n<|im_start|>assistant\nNothing.<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert sum(p.numel() for p in model.parameters()) == architecture.num_parameters(len(tokenizer))
